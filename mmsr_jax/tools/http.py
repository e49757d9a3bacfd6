"""The one HTTP client of the search tools: whatever happens, a response or a named error."""

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping

import httpx

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.limits import Limits


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """How the client behaves; seconds and bytes."""

    retries: int = 2  # further tries after the first
    backoff: float = 0.5  # the n-th pause is drawn from 0 to backoff * 2**n
    backoff_max: float = 8.0
    max_bytes: int = 4 << 20  # of a body, after decompression
    connect_timeout: float = 5.0
    read_timeout: float = 20.0  # silence on an open connection
    redirects: int = 5
    limits: Mapping[str, Limits] = dataclasses.field(default_factory=dict)  # by provider
    default_limits: Limits = Limits()  # for providers that `limits` does not name
    allow: tuple[str, ...] = ()  # "host" or "host:port" that `public_only` requests may reach too
    ca_file: str = ""  # PEM; "" means the machine's own authorities
    user_agent: str = "mmsr-jax"


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """One call. `secrets` never appear in an error or a log, whoever echoes them."""

    provider: str
    method: str
    url: str
    params: Mapping[str, str] | None = None
    headers: Mapping[str, str] | None = None
    json: object | None = None
    deadline: float = 30.0  # seconds for everything: waiting, retries, redirects, the body
    max_bytes: int | None = None  # None: the client's
    secrets: tuple[str, ...] = ()
    public_only: bool = False  # whoever wrote the URL is not trusted: public addresses only


@dataclasses.dataclass(frozen=True)
class HttpResponse:
    """A 2xx response, its body read and decompressed."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    url: str  # after redirects

    def json(self) -> object:
        """The body as JSON. ToolError "bad_response" when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise ToolError("bad_response", "the body is not JSON") from None


class HttpError(ToolError):
    """A `ToolError` that knows what the server said, for providers whose words say more."""

    def __init__(self, kind: str, message: str = "", status: int | None = None, body: bytes = b""):
        super().__init__(kind, message)
        self.status = status  # None: no response came
        self.body = body  # its beginning, at most some kilobytes; unscrubbed, so never log it


class Http:
    """The client. One an event loop; `async with`, or `close` at the end.

    Args:
        config: limits and patience.
        transport: an `httpx.AsyncBaseTransport` that stands in for the network, in tests.
        clock, sleep: the same, for time.
    """

    def __init__(
        self,
        config: HttpConfig,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ):
        self._config = config
        self._transport = transport or httpx.AsyncHTTPTransport()

    async def __aenter__(self) -> "Http":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.aclose()

    def counters(self) -> dict[str, float]:
        """Totals since the start, flat: "serper/calls", ".../retries", ".../faults/timeout"."""
        return {}

    async def send(self, request: HttpRequest) -> HttpResponse:
        """Sends it, and again if that may help.

        Raises:
            ToolError: (most are `HttpError`) "unauthorized" (401, 403), "quota" (402),
                "rate_limited" (429, or our own limit would outlast the deadline), "server_error"
                (5xx), "timeout", "unreachable", "too_large", "refused" (the address guard),
                "bad_response" (any other status, broken HTTP), "circuit_open".
        """
        raw = httpx.Request(
            request.method,
            request.url,
            params=request.params,
            headers=request.headers,
            json=request.json,
        )
        try:
            async with asyncio.timeout(request.deadline):
                response = await self._transport.handle_async_request(raw)
                body = await response.aread()
        except TimeoutError:
            raise HttpError("timeout", f"no answer in {request.deadline:g} s") from None
        except httpx.TransportError as error:
            raise HttpError("unreachable", type(error).__name__) from None
        if response.status_code >= 300:
            kinds = {401: "unauthorized", 403: "unauthorized", 402: "quota", 429: "rate_limited"}
            status = response.status_code
            kind = kinds.get(status, "server_error" if status >= 500 else "bad_response")
            raise HttpError(kind, f"HTTP {status}", status, body[:4096])
        return HttpResponse(response.status_code, dict(response.headers), body, request.url)
