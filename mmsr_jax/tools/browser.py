"""Pages that need their scripts: headless Chromium through Playwright (extra `browser`).

The browser gets no network of its own. Every request that a page makes is answered by our HTTP
client, past the address guard and its limits; what tries another way meets a proxy that is none.
"""

import asyncio
import contextlib
import time
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpRequest, HttpResponse
from mmsr_jax.tools.pages import ACCEPT, Page, PageParser, ReaderConfig, page_kind

LOADED = frozenset({"document", "script", "xhr", "fetch", "stylesheet"})  # pictures say nothing
MAX_REQUESTS = 100  # a page
SETTLE = 5.0  # seconds that a page may go on loading after its document is there
PARSING = 3.0  # seconds kept back for the parser
NOWHERE = "http://127.0.0.1:9"  # the discard port
DROPPED = ("content-encoding", "content-length", "transfer-encoding", "set-cookie")
ARGUMENTS = (
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--js-flags=--max-old-space-size=256",
)


class BrowserReader:
    """Runs a page's scripts and reads what they made of it. PDF and plain text need no browser.

    Args:
        parser: makes text of bodies; closed with the reader.

    Raises:
        ValueError: Playwright is not installed.
    """

    provider = "browser"

    def __init__(self, http: Http, config: ReaderConfig, parser: PageParser):
        try:
            import playwright.async_api
        except ImportError as error:
            raise ValueError(
                "reader kind 'browser' needs Playwright: pip install 'mmsr-jax[browser]' and "
                "then: playwright install chromium"
            ) from error
        self._playwright = playwright.async_api
        self._http, self._config = http, config
        self._parser = parser
        self._starting = asyncio.Lock()
        self._driver: Any = None
        self._browser: Any = None

    async def read(self, url: str, deadline: float) -> Page:
        """The page's main text after its scripts ran. ToolError: see `Reader`."""
        end = time.monotonic() + deadline
        document = await self._fetch(url, deadline)
        declared = document.headers.get("content-type", "")
        if page_kind(document.body, declared) != "html":
            left = end - time.monotonic()
            return Page(document.url, *await self._parser.parse(document.body, declared, left))
        left = end - time.monotonic() - PARSING
        if left <= 0:
            raise ToolError("timeout", f"{deadline:g} s are too few for the browser")
        try:
            async with asyncio.timeout(left):
                html = await self._render(document, left)
        except TimeoutError:
            raise ToolError("timeout", f"{deadline:g} s are over, running scripts") from None
        except self._playwright.Error as error:
            if "Executable doesn't exist" in str(error):
                text = "Chromium is not installed: playwright install chromium"
                raise ToolError("no_browser", text) from None
            why = str(error).splitlines()[0][:120]
            raise ToolError("bad_response", f"the browser failed: {why}") from None
        if len(html) > self._config.max_bytes:
            raise ToolError("too_large", f"scripts made a page of {len(html)} characters")
        left = end - time.monotonic()
        kind = "text/html; charset=utf-8"
        parsed = await self._parser.parse(html.encode("utf-8", "replace"), kind, left)
        return Page(document.url, *parsed)

    async def close(self) -> None:
        """Ends the browser and the parsers."""
        await self._parser.close()
        for thing, end in ((self._browser, "close"), (self._driver, "stop")):
            if thing is not None:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(getattr(thing, end)(), 5.0)
        self._browser = self._driver = None

    async def _render(self, document: HttpResponse, left: float) -> str:
        """The HTML after scripts ran."""
        end = time.monotonic() + left
        browser = await self._started()
        context = await browser.new_context(service_workers="block", accept_downloads=False)
        try:
            count = 0

            async def answer(route: Any) -> None:
                nonlocal count
                count += 1
                left = end - time.monotonic()
                with contextlib.suppress(self._playwright.Error):  # the page may be gone
                    await self._answer(route, document, left if count <= MAX_REQUESTS else 0.0)

            await context.route("**/*", answer)
            await context.route_web_socket("**/*", lambda socket: socket.close())
            page = await context.new_page()
            await page.goto(document.url, wait_until="domcontentloaded", timeout=left * 1000)
            settle = min(SETTLE, (end - time.monotonic()) / 2)
            with contextlib.suppress(self._playwright.TimeoutError):  # some pages never rest
                await page.wait_for_load_state("networkidle", timeout=max(settle, 0.1) * 1000)
            return await page.content()
        finally:
            await self._discard(context)

    async def _answer(self, route: Any, document: HttpResponse, left: float) -> None:
        """Gives the browser what it asked for, or nothing."""
        request = route.request
        if request.resource_type == "document" and request.is_navigation_request():
            if request.url != document.url:  # scripts lead elsewhere, or a frame
                await route.abort()
                return
            response = document
        elif request.resource_type not in LOADED or request.method != "GET" or left <= 0:
            await route.abort()
            return
        else:
            try:
                response = await self._fetch(request.url, left)
            except ToolError:
                await route.abort()
                return
        headers = {k: v for k, v in response.headers.items() if k not in DROPPED}
        await route.fulfill(status=200, headers=headers, body=response.body)

    async def _fetch(self, url: str, deadline: float) -> HttpResponse:
        return await self._http.send(
            HttpRequest(
                self.provider,
                "GET",
                url,
                headers={"Accept": ACCEPT},
                deadline=deadline,
                max_bytes=self._config.max_bytes,
                public_only=True,
            )
        )

    async def _started(self) -> Any:
        async with self._starting:
            if self._browser is None or not self._browser.is_connected():
                if self._driver is None:
                    self._driver = await self._playwright.async_playwright().start()
                self._browser = await self._driver.chromium.launch(
                    chromium_sandbox=self._config.browser_sandbox,
                    proxy={"server": NOWHERE},
                    args=list(ARGUMENTS),
                )
            return self._browser

    async def _discard(self, context: Any) -> None:
        """Closes a context; a browser that does not let go of it is ended."""
        closing = asyncio.ensure_future(context.close())
        done, _ = await asyncio.wait({closing}, timeout=2.0)
        if not done or closing.exception():
            browser, self._browser = self._browser, None
            closing.cancel()
            if browser is not None:
                ending = asyncio.ensure_future(browser.close())
                ending.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
