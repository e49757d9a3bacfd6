"""The ways to the network: straight, through a proxy, or pinned to a checked address."""

import contextlib
import functools
import ssl
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from mmsr_jax.tools.body import ENCODINGS
from mmsr_jax.tools.budget import Hold
from mmsr_jax.tools.exchange import HttpError, HttpRequest
from mmsr_jax.tools.guard import Target

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # not where a proxy would look for it
MAX_ROUTES = 3  # addresses of one name that are tried


class Routes:
    """The ways to the network.

    Args:
      connect, read: seconds that a connection, and silence on it, may take.
      ca_file: as in `HttpConfig`.
      transport: stands in for the network, in tests.

    Raises:
      ValueError: a proxy of the environment that is none, or an unreadable `ca_file`.
    """

    def __init__(
        self,
        connect: float,
        read: float,
        ca_file: str,
        user_agent: str,
        transport: httpx.AsyncBaseTransport | None,
    ):
        self._connect, self._read, self._user_agent = connect, read, user_agent
        self._proxied: dict[str, httpx.AsyncBaseTransport] = {}
        if transport is not None:
            self._straight = self._pinned = transport
            return
        context = _tls(ca_file)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._straight = httpx.AsyncHTTPTransport(verify=context, limits=limits)
        # A kept connection belongs to an address. Two sites may share one, and the certificate
        # was checked for the first of them only: so none is kept.
        once = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._pinned = httpx.AsyncHTTPTransport(verify=context, limits=once)
        proxies = urllib.request.getproxies()
        for scheme in ("http", "https"):
            if address := proxies.get(scheme) or proxies.get("all"):
                self._proxied[scheme] = _through(scheme, address, context, limits)

    async def close(self) -> None:
        for transport in {self._straight, self._pinned, *self._proxied.values()}:
            await transport.aclose()

    @contextlib.asynccontextmanager
    async def open(
        self,
        request: HttpRequest,
        url: httpx.URL,
        headers: dict[str, str],
        target: Target | None,
        left: Callable[[], float],
        money: Hold | None,
    ) -> AsyncIterator[httpx.Response]:
        """The response to one request, its body unread.

        Args:
          target: where a `public_only` request leads; None for others.
          left: seconds until the call's deadline.
          money: hears when the request goes out.
        """
        headers = httpx.Headers({"User-Agent": self._user_agent} | headers)
        headers["Accept-Encoding"] = ENCODINGS
        if target is not None:
            url = httpx.URL(target.url)
            headers["Connection"] = "close"
            if url.raw_host.decode("ascii") != target.host:
                raise HttpError("refused", "a host that can be read in two ways")
        elif url.scheme not in ("http", "https") or not url.host:
            raise HttpError("refused", f"only http and https, not {url.scheme[:20]!r}")
        raw = httpx.Request(request.method, url, headers=headers, json=request.json)
        raw.extensions = {"timeout": self._timeouts(left())}
        if money is not None:
            raw.extensions["trace"] = _tell(money)
        if target is None:
            response = await self._proxy(url).handle_async_request(raw)
        else:
            response = await self._pin(raw, target, left)
        if money is not None:
            money.sent()  # a stand-in for the network has no trace
        try:
            yield response
        finally:
            with contextlib.suppress(Exception):
                await response.aclose()

    async def _pin(
        self, raw: httpx.Request, target: Target, left: Callable[[], float]
    ) -> httpx.Response:
        """Connects to the addresses that were checked; Host header and TLS keep the name."""
        name = target.host if target.host not in target.addresses else None
        failed: Exception | None = None
        for address in target.addresses[:MAX_ROUTES]:
            host = f"[{address}]" if ":" in address else address
            extensions = {"timeout": self._timeouts(left())}
            if name is not None:
                extensions["sni_hostname"] = name
            there = httpx.Request(  # the Host header is among those that are taken over
                raw.method, raw.url.copy_with(host=host), headers=raw.headers, stream=raw.stream
            )
            there.extensions = extensions
            try:
                return await self._pinned.handle_async_request(there)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed

    def _proxy(self, url: httpx.URL) -> httpx.AsyncBaseTransport:
        proxied = self._proxied.get(url.scheme)
        if proxied is None or url.host in LOOPBACK or urllib.request.proxy_bypass(url.host):
            return self._straight
        return proxied

    def _timeouts(self, left: float) -> dict[str, float]:
        read = self._read
        return {"connect": min(self._connect, left), "read": read, "write": read, "pool": read}


def _tell(money: Hold) -> Callable[[str, dict[str, Any]], Awaitable[None]]:
    """A trace for httpcore (https://www.encode.io/httpcore/extensions/): the request goes out."""

    async def trace(event: str, info: dict[str, Any]) -> None:
        begins = event.endswith(".send_request_headers.started")
        if begins and info["request"].method != b"CONNECT":  # that one is for a proxy
            money.sent()

    return trace


def _through(
    scheme: str, address: str, context: ssl.SSLContext, limits: httpx.Limits
) -> httpx.AsyncHTTPTransport:
    """The way through a proxy. ValueError, without the password that may be in the address."""
    if "://" not in address:
        address = f"http://{address}"  # curl and others read it so
    try:
        return httpx.AsyncHTTPTransport(context, limits=limits, proxy=address)
    except ImportError:
        kind, cure = address.partition("://")[0], "pip install 'httpx[socks]'"
        raise ValueError(f"the {scheme} proxy speaks {kind}: {cure} brings it") from None
    except Exception:  # their words hold the address, and it a password
        cure = "give HTTP_PROXY, HTTPS_PROXY or ALL_PROXY as http://host:port"
        raise ValueError(f"the {scheme} proxy of the environment is none: {cure}") from None


@functools.cache  # reading the authorities takes a tenth of a second
def _tls(ca_file: str) -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise ValueError(f"ca_file {ca_file} cannot be read: {error}") from error
    return context
