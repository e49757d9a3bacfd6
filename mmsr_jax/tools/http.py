"""The one HTTP client of the search tools: whatever happens, a response or a named error.

Rate and concurrency limits, retries, a circuit breaker and the address guard stand between a
caller and the network; one deadline holds over all of them. Requests go to httpx's transports
directly: its client would log URLs, and with them keys, and keep cookies.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

import httpx

from mmsr_jax.tools import budget
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.body import read_body, within
from mmsr_jax.tools.exchange import (
    MAX_ERROR_BODY,
    HttpError,
    HttpRequest,
    HttpResponse,
    cleaned,
    failure,
)
from mmsr_jax.tools.guard import Guard, Resolve
from mmsr_jax.tools.limits import Gate, Limits
from mmsr_jax.tools.redact import redact
from mmsr_jax.tools.retry import Pauses
from mmsr_jax.tools.routes import Routes

# It would print the headers that come back, and servers echo keys.
logging.getLogger("httpcore").setLevel(logging.INFO)

REDIRECTS = frozenset({301, 302, 303, 307, 308})
BROKEN = frozenset({"server_error", "timeout", "unreachable"})  # what opens a circuit


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """How the client behaves; seconds and bytes."""

    retries: int = 2  # further tries after the first
    backoff: float = 0.5  # the n-th pause is drawn from 0 to backoff * 2**n
    backoff_max: float = 8.0
    hold_max: float = 60.0  # a provider's Retry-After holds all of its calls, so long at most
    max_bytes: int = 4 << 20  # of a body, after decompression
    connect_timeout: float = 5.0
    read_timeout: float = 20.0  # silence on an open connection
    redirects: int = 5
    limits: Mapping[str, Limits] = dataclasses.field(default_factory=dict)  # by provider
    default_limits: Limits = Limits()  # for providers that `limits` does not name
    allow: tuple[str, ...] = ()  # "host" or "host:port" that `public_only` requests may reach too
    ca_file: str = ""  # PEM; empty: the usual authorities
    user_agent: str = "mmsr-jax"

    def __post_init__(self):
        for name in ("retries", "redirects", "backoff", "backoff_max", "hold_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0, and is {getattr(self, name)}")
        for name in ("max_bytes", "connect_timeout", "read_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclasses.dataclass
class _Call:
    """One `send` under way."""

    request: HttpRequest
    left: Callable[[], float]  # seconds until its deadline
    money: budget.Hold | None  # set aside for it; hears what may be billed
    doing: str = "waiting for a slot"


class Http:
    """The client. One an event loop; `async with`, or `close` at the end.

    Proxies of the environment (HTTPS_PROXY, NO_PROXY, ...) are used for providers, never for
    `public_only` requests: a proxy would look names up itself, after the guard did.

    Args:
        config: limits and patience.
        transport: an `httpx.AsyncBaseTransport` that stands in for the network, in tests.
        clock, sleep, rng: the same, for time and chance.
        resolve: the same, for the guard's name server.
    """

    def __init__(
        self,
        config: HttpConfig,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
        resolve: Resolve | None = None,
    ):
        self._config, self._clock, self._sleep = config, clock, sleep
        self._guard = Guard(config.allow, resolve)
        self._pauses = Pauses(config.backoff, config.backoff_max, rng or random.Random())
        self._gates: dict[str, Gate] = {}
        self._counters: dict[str, collections.Counter] = {}
        self._routes = Routes(
            config.connect_timeout, config.read_timeout, config.ca_file, config.user_agent,
            transport,
        )  # fmt: skip

    async def __aenter__(self) -> "Http":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections."""
        await self._routes.close()

    def counters(self) -> dict[str, float]:
        """Totals since the start, flat: "serper/calls", ".../retries", ".../faults/timeout".

        `calls` ended, good or bad; `errors` of them with an error; `retries`; `bytes` of bodies;
        `seconds` summed over calls; `faults/KIND` counts every failed try, mended or not.
        """
        return {
            f"{provider}/{name}": value
            for provider, counter in self._counters.items()
            for name, value in counter.items()
        }

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Sends it, and again if that may help.

        Raises:
            ToolError: (an `HttpError`) "unauthorized" (401, 403), "quota" (402), "rate_limited"
                (429, or a wait that would outlast the deadline), "server_error" (5xx), "timeout",
                "unreachable", "too_large", "refused" (by the address guard), "bad_response" (any
                other status, broken HTTP), "circuit_open".
        """
        counter = self._counters.setdefault(
            request.provider, collections.Counter(calls=0, errors=0, retries=0, bytes=0, seconds=0)
        )
        started = self._clock()
        money = None if request.public_only else budget.current()  # strangers' pages bill nobody
        call = _Call(request, lambda: started + request.deadline - self._clock(), money)
        try:
            async with asyncio.timeout(request.deadline):
                response = await self._persist(call, counter)
            counter["bytes"] += len(response.body)
            return response
        except TimeoutError:
            counter["faults/timeout"] += 1
            counter["errors"] += 1
            text = f"{request.deadline:g} s are over, {call.doing}"
            raise HttpError("timeout", redact(text, request.secrets)) from None
        except HttpError:
            counter["errors"] += 1
            raise
        finally:
            counter["calls"] += 1
            counter["seconds"] += self._clock() - started

    async def _persist(self, call: _Call, counter: collections.Counter) -> HttpResponse:
        """Tries until it works, or until another try is no use."""
        request, gate = call.request, self._gate(call.request.provider)
        last: HttpError | None = None
        for tries in range(self._config.retries + 1):
            try:
                return await self._try(call, gate)
            except ToolError as raised:
                error = cleaned(raised, request.secrets)
            if last and error.kind == "circuit_open":
                raise last  # it opened under our own tries: what went wrong says more
            counter[f"faults/{error.kind}"] += 1
            pause, last = self._pauses.draw(tries), error
            if error.retry_after is not None:
                pause = max(pause, error.retry_after)
                if error.status == 429 and not request.public_only:
                    # All calls wait, not just this one, or the provider hears of us all the same.
                    gate.bucket.close(min(error.retry_after, self._config.hold_max))
            if not error.again or tries == self._config.retries or pause >= call.left():
                raise error
            if call.money is not None and not call.money.again():
                raise error  # the try before may be billed, and for another there is no money
            counter["retries"] += 1
            call.doing = f"waiting to try again after {error}"
            await self._sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _try(self, call: _Call, gate: Gate) -> HttpResponse:
        """One try, redirects included, past the limits and the circuit breaker."""
        # The open web is no provider that breaks as a whole: each of its hosts has a circuit.
        public = call.request.public_only
        circuit = gate.breaker(self._guard.read(call.request.url).host if public else "")
        token = circuit.enter()
        good = None
        try:
            async with gate.admitted(call.left):
                token = circuit.enter(token)  # it may have opened while we waited
                call.doing, patience = "waiting for the server", call.left()
                try:
                    response = await self._follow(call)
                except ToolError as error:
                    good = error.kind not in BROKEN  # a server that refuses us works
                    raise
                except asyncio.CancelledError:
                    # Our caller left, or we came late ourselves; or the server was too slow.
                    slow = call.left() <= 0 and patience >= call.request.deadline / 2
                    good = False if slow else None
                    raise
                good = True
                return response
        finally:
            circuit.record(token, good)

    async def _follow(self, call: _Call) -> HttpResponse:
        """Sends the request, and again to wherever the answer points."""
        request, headers = call.request, dict(call.request.headers or {})
        limit = self._config.max_bytes if request.max_bytes is None else request.max_bytes
        with _named():
            url = self._guard.read(request.url).url if request.public_only else request.url
            url = httpx.URL(url)
            url = url.copy_merge_params(request.params) if request.params else url
        for _ in range(self._config.redirects + 1):
            target = await self._guard.check(str(url)) if request.public_only else None
            with _named():
                ways = self._routes.open(request, url, headers, target, call.left, call.money)
                async with ways as response:
                    if response.status_code in REDIRECTS and "location" in response.headers:
                        there = _redirected(request, url, response)
                    elif 200 <= response.status_code < 300:
                        body = await _body(response, limit)
                        final = str(url) if target is None else target.url
                        final = redact(final, request.secrets) if request.secrets else final
                        head = dict(response.headers)
                        return HttpResponse(response.status_code, head, body, final)
                    else:
                        if call.money is not None:
                            call.money.refused(response.status_code)
                        raise await _failure(response, request)
            if (there.scheme, there.host, there.port) != (url.scheme, url.host, url.port):
                headers = {}  # they may hold a key, which is for the first server only
            url = there
        raise HttpError("bad_response", f"more than {self._config.redirects} redirects")

    def _gate(self, provider: str) -> Gate:
        if provider not in self._gates:
            limits = self._config.limits.get(provider, self._config.default_limits)
            self._gates[provider] = Gate(limits, self._clock, self._sleep)
        return self._gates[provider]


def _redirected(request: HttpRequest, url: httpx.URL, response: httpx.Response) -> httpx.URL:
    if request.method.upper() not in ("GET", "HEAD"):
        raise HttpError("bad_response", f"a {request.method} was redirected", response.status_code)
    there = url.join(response.headers["location"])
    if request.secrets and url.scheme == "https" and there.scheme != "https":
        raise HttpError("refused", "a redirect from https to http of a request with a key")
    return there


async def _body(response: httpx.Response, limit: int) -> bytes:
    """The decompressed body. ToolError of `read_body`."""
    if response.is_stream_consumed:  # a stand-in for the network had it whole
        return within(response.content, limit)
    encoding = response.headers.get("content-encoding", "")
    length = response.headers.get("content-length")
    return await read_body(response.aiter_raw(), encoding, length, limit)


async def _failure(response: httpx.Response, request: HttpRequest) -> HttpError:
    """The error that a response's status stands for."""
    headers, body = response.headers, b""
    with contextlib.suppress(ToolError, httpx.TransportError):
        body = await _body(response, 64 * MAX_ERROR_BODY)
    show = not request.public_only  # what a stranger's page says is no error text
    return failure(response.status_code, headers, body, request.secrets, show)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Gives every exception of httpx a name of ours. None keeps its cause: that may hold a key."""
    again = True
    try:
        yield
        return
    except ToolError:
        raise
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        kind, text = "unreachable", f"no connection: {str(error)[:100] or type(error).__name__}"
        again = "CERTIFICATE" not in text
    except httpx.TimeoutException:
        kind, text = "timeout", "the server fell silent"
    except httpx.RemoteProtocolError as error:
        # httpx knows two ends of a talk by their words only.
        again = any(word in str(error) for word in ("disconnected", "closed", "incomplete"))
        kind = "unreachable" if again else "bad_response"
        text = "the connection broke" if again else "the answer is not HTTP"
    except (httpx.NetworkError, OSError):
        kind, text = "unreachable", "the connection broke"
    except (httpx.InvalidURL, httpx.LocalProtocolError, ValueError, TypeError) as error:
        kind, text, again = "refused", f"no such request can be sent: {type(error).__name__}", False
    except Exception as error:
        kind, text, again = "bad_response", type(error).__name__, False
    named = HttpError(kind, text)
    named.again = again
    raise named from None
