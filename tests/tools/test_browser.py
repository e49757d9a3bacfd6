"""The browser reader: by Playwright's own interface, and with Chromium where there is one."""

import asyncio
import inspect

import pytest
from fault_server import FaultServer, path, response

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpConfig
from mmsr_jax.tools.pages import ReaderConfig
from mmsr_jax.tools.reader import make_reader

api = pytest.importorskip("playwright.async_api")

PAGE = b"""<html><head><title>A page</title><script src="/words.js"></script></head><body>
<article><p id=p>Nothing yet.</p></article><script>
fetch("http://127.0.0.1:%d/secret").then(r => r.text()).then(t => document.title = t);
new WebSocket("ws://127.0.0.1:%d/socket");
document.getElementById("p").innerHTML = words();</script></body></html>"""
WORDS = (
    b"function words() { return 'Nepal is a country in the Himalayas, and its capital is "
    b"Kathmandu, a city that is old. '.repeat(3) }"
)


def site(other):
    """A page whose words come by script, and which asks for what it should not get."""

    async def handler(head, reader, writer):
        if path(head) == "/words.js":
            writer.write(response(body=WORDS, content_type="text/javascript"))
        elif path(head) == "/plain":
            writer.write(response(body=b"plain words", content_type="text/plain"))
        else:
            page = PAGE % (other.port, other.port)
            writer.write(response(body=page, content_type="text/html"))

    return handler


async def secret(head, reader, writer):
    writer.write(
        response(body=b"SECRET", content_type="text/plain", Access_Control_Allow_Origin="*")
    )


def read(where="/", deadline=30.0, install=None):
    """Reads a page of the site -> (page or error, what was asked of it, and of its neighbour)."""

    async def run():
        async with FaultServer(secret) as other, FaultServer(site(other)) as server:
            allow = (f"127.0.0.1:{server.port}",)
            async with Http(HttpConfig(retries=0, allow=allow)) as http:
                config = ReaderConfig(kind="browser", parsers=1, browser_sandbox=False)
                reader = make_reader(http, config)
                if install:
                    install(reader)
                try:
                    found = await reader.read(server.url + where, deadline)
                except ToolError as error:
                    found = error
                await reader.close()
            return found, [path(head) for head in server.heads], other.heads

    return asyncio.run(run())


def test_a_real_browser_runs_the_scripts_and_reaches_nothing_else():
    page, asked, others = read()
    if isinstance(page, ToolError) and page.kind == "no_browser":
        assert str(page) == "no_browser: Chromium is not installed: playwright install chromium"
        pytest.skip("Chromium is not installed")
    assert "capital is Kathmandu" in page.text and page.title == "A page"
    assert asked == ["/", "/words.js"] and not others


def test_plain_text_needs_no_browser():
    page, asked, _ = read("/plain")
    assert page.text == "plain words" and asked == ["/plain"]


class Like:
    """Stands in for one of Playwright's classes; calls must fit that class's signatures."""

    def __init__(self, kind, **methods):
        self._kind, self._methods, self.calls = kind, methods, []

    def __getattr__(self, name):
        real = getattr(self._kind, name)  # AttributeError: there is no such thing
        if isinstance(real, property):
            return self._methods[name]

        async def call(*args, **kwargs):
            inspect.signature(real).bind(self, *args, **kwargs)
            self.calls.append((name, args, kwargs))
            method = self._methods.get(name)
            return await method(*args, **kwargs) if method else None

        return call


class Browser:
    """As much of a browser as asks for what the page above asks for."""

    def __init__(self, requests, content, hang=False):
        self.requests, self.content, self.hang = requests, content, hang
        self.answers = {}
        self.browser = Like(api.Browser, new_context=self.new_context)
        self.browser.is_connected = lambda: True

    def install(self, reader):
        reader._browser = self.browser

    async def new_context(self, **options):
        self.options = options
        methods = {"route": self.route, "new_page": self.new_page}
        self.context = Like(api.BrowserContext, **methods)
        return self.context

    async def route(self, pattern, handler):
        assert pattern == "**/*"
        self.handler = handler

    async def new_page(self):
        return Like(api.Page, goto=self.goto, content=self.read)

    async def goto(self, url, **options):
        for kind, method, there in [("document", "GET", url), *self.requests]:
            request = Like(api.Request, resource_type=kind, method=method, url=there)
            request.is_navigation_request = lambda kind=kind: kind == "document"
            self.answers[there] = "nothing"

            async def fulfill(there=there, **answer):
                self.answers[there] = answer["body"]

            async def abort(there=there):
                self.answers[there] = "aborted"

            route = Like(api.Route, request=request, fulfill=fulfill, abort=abort)
            await self.handler(route)

    async def read(self):
        if self.hang:
            await asyncio.sleep(60)
        return self.content


CONTENT = "<html><title>A page</title><article><p>" + "Made by scripts, all of it. " * 9


def test_every_request_of_the_page_passes_the_guard(monkeypatch):
    requests = [
        ("script", "GET", "http://127.0.0.1:1/x.js"),
        ("xhr", "GET", "http://169.254.169.254/latest/"),
        ("fetch", "GET", "file:///etc/passwd"),
        ("fetch", "POST", "http://example.com/"),
        ("image", "GET", "http://example.com/a.png"),
        ("document", "GET", "http://example.com/frame"),
    ]
    browser = Browser(requests, CONTENT)
    page, asked, others = read(install=browser.install)
    assert page.title == "A page" and page.text.startswith("Made by scripts")
    assert asked == ["/"] and not others
    document, *answers = browser.answers.values()
    assert document.startswith(b"<html>") and answers == ["aborted"] * len(requests)
    assert browser.options == {"service_workers": "block", "accept_downloads": False}
    names = [name for name, _, _ in browser.context.calls]
    assert names == ["route", "route_web_socket", "new_page", "close"]


def test_scripts_that_never_end_cost_the_deadline():
    browser = Browser([], CONTENT, hang=True)
    error, _, _ = read(deadline=3.5, install=browser.install)
    assert str(error) == "timeout: 3.5 s are over, running scripts"
    assert browser.context.calls[-1][0] == "close"
    error, _, _ = read(deadline=1.0, install=browser.install)
    assert str(error) == "timeout: 1 s are too few for the browser"


def test_a_page_that_grows_without_end():
    browser = Browser([], "x" * (ReaderConfig().max_bytes + 1))
    error, _, _ = read(install=browser.install)
    assert str(error).startswith("too_large: scripts made a page of 8388609 characters")


def test_the_browser_starts_without_a_network(monkeypatch):
    """The arguments of the launch fit Playwright, and give the browser no way out."""
    launched = {}

    async def launch(**options):
        launched.update(options)
        raise api.Error("BrowserType.launch: some trouble\nmore of it")

    class Driver:
        chromium = Like(api.BrowserType, launch=launch)

        async def stop(self):
            pass

    def install(reader):
        reader._driver = Driver()

    error, _, _ = read(install=install)
    assert str(error) == "bad_response: the browser failed: BrowserType.launch: some trouble"
    assert launched["proxy"] == {"server": "http://127.0.0.1:9"}
    assert "--proxy-bypass-list=<-loopback>" in launched["args"]
    assert launched["chromium_sandbox"] is False  # as this test's config has it
