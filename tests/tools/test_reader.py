"""Page to text: HTML, PDF, plain text, charsets, Jina, and parsers that hang or die."""

import asyncio
import io
import json
import os
import sys
import zlib

import pypdf
import pytest
from fault_server import FaultServer, always, header, path, response
from sample_pages import ARTICLE, pdf

from mmsr_jax.tools import browser as browser_lib
from mmsr_jax.tools import parsing, workers
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpConfig
from mmsr_jax.tools.pages import ReaderConfig, charset, page_kind
from mmsr_jax.tools.reader import JinaReader, LocalReader, make_reader
from mmsr_jax.tools.workers import Parsers

KEY = "jina_secret_key"


def read_all(handlers, reader=LocalReader, path="/", deadline=20.0, **config):
    """Reads a page of each handler, with one reader -> pages or errors, and the server."""

    async def run():
        found = []
        async with FaultServer(None) as server:
            config.setdefault("jina_url", server.url + "/")
            allow = (f"127.0.0.1:{server.port}",)
            async with Http(HttpConfig(retries=0, allow=allow)) as http:
                reads = reader(http, ReaderConfig(parsers=1, **config))
                for server.handler in handlers:
                    try:
                        url = path if "//" in path else server.url + path
                        found.append(await reads.read(url, deadline))
                    except ToolError as error:
                        found.append(error)
                await reads.close()
        return found, server

    return asyncio.run(run())


def read(handler, *args, **kwargs):
    """The same with one handler -> (page or error, server)."""
    (found,), server = read_all([handler], *args, **kwargs)
    return found, server


def test_the_main_text_of_a_page():
    page, server = read(always(body=ARTICLE.encode(), content_type="text/html"), path="/nepal?a=b")
    assert page.url == server.url + "/nepal?a=b" and page.title == "Nepal & its flag"
    assert "capital is Kathmandu" in page.text and "not a quadrilateral" in page.text
    for other in ("alert", "About us", "Copyright", "<"):
        assert other not in page.text
    assert "text/html" in header(server.heads[0], "accept")


def test_the_final_address_is_that_after_redirects():
    async def handler(head, reader, writer):
        if path(head) == "/":
            writer.write(response(301, Location="/there"))
        else:
            writer.write(response(body=ARTICLE.encode(), content_type="text/html"))

    page, server = read(handler)
    assert page.url == server.url + "/there"


def test_pdf():
    lines = ("Kathmandu is the capital", "Second page", "Third page")
    # Many servers say that a PDF is something else.
    types = ("application/pdf", "application/octet-stream", "text/html")
    bodies = [pdf(*lines), pdf(*lines, compress=True), pdf(*lines)]
    handlers = [always(body=b, content_type=t) for b, t in zip(bodies, types, strict=True)]
    for page in read_all(handlers, max_pages=2)[0]:
        assert page.title == "A report"
        assert page.text.split("\n") == ["Kathmandu is the capital", "Second page"]


def test_plain_text_and_limits():
    page, _ = read(always(body=b"a b\r\n\x00c" * 100, content_type="text/plain"), max_chars=12)
    assert page.text == "a b\nca b\nca" and page.title == ""
    error, _ = read(always(body=b"x" * 2000, content_type="text/plain"), max_bytes=1999)
    assert str(error) == "too_large: the body has more than 1999 bytes"


def test_charsets():
    text = "日本語の国旗は白地に赤い丸である。"
    whole = f"<html><body><p>{text}</p></body></html>"
    sjis = whole.encode("shift_jis")
    bodies = [
        (sjis, "text/html; charset=Shift_JIS"),
        (whole.encode("euc-jp"), 'text/html; charset="euc-jp"'),
        (b"<meta charset='shift_jis'>" + sjis, "text/html"),
        (b'<meta http-equiv="x" content="text/html; charset=shift_jis">' + sjis, "text/html"),
        (whole.encode(), "text/html"),
        (whole.encode("utf-16"), "text/html; charset=latin-1"),
        (whole.encode("utf-8-sig"), "text/html; charset=nonsense"),
        (whole.encode(), "text/html; charset=zlib"),
        (whole.encode(), "text/html; charset=" + "x" * 10_000),
        (text.encode(), "text/html"),
        (text.encode(), "text/plain"),
        (text.encode("gb18030"), "text/plain; charset=gb18030"),
    ]
    found, _ = read_all([always(body=body, content_type=kind) for body, kind in bodies])
    assert [getattr(page, "text", page) for page in found] == [text] * len(bodies)


def test_windows_pages_that_say_latin_1():
    assert parsing.decode("“naïve” €".encode("cp1252"), "iso-8859-1") == "“naïve” €"
    assert parsing.decode(b"caf\xe9", "") is None
    assert parsing.decode("café".encode(), "us-ascii") == "cafÃ©"  # it lied, and gets what it said
    assert parsing.clean("a\x00\x1b[31m\u0085\ufeff\ud800\r\rb") == "a[31m?\n\nb"


NO_TEXT = [
    (b"", "text/html", "no_text: no text in 0 bytes of html"),
    (b"<html><script>x()</script></html>", "text/html", "no_text"),
    (b" \n\x00\t", "text/plain", "no_text"),
    (pdf(""), "application/pdf", "no_text"),
    (b"GIF89a", "image/gif", "bad_response: content type 'image/gif' is no page"),
    (b"PK\x03\x04", "application/octet-stream", "bad_response: content type"),
    (b"hello", "", "bad_response: content type 'none' is no page"),
    (b"<html></html>", "application/pdf", "bad_response: a PDF without a PDF's head"),
    (b"%PDF-1.7\nnothing", "application/pdf", "bad_response: the PDF is broken"),
    (pdf("x")[:300], "application/pdf", "bad_response: the PDF is broken"),
]


def test_what_gives_no_text_has_a_name():
    handlers = [always(body=body, content_type=kind) for body, kind, _ in NO_TEXT]
    for error, (_, _, text) in zip(read_all(handlers)[0], NO_TEXT, strict=True):
        assert isinstance(error, ToolError) and str(error).startswith(text), (error, text)


def test_a_locked_pdf():
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    error, _ = read(always(body=out.getvalue(), content_type="application/pdf"))
    assert str(error) == "bad_response: the PDF is locked with a password"


def test_the_reader_goes_to_public_pages_only():
    async def run():
        async with FaultServer(always(body=b"x")) as server, Http(HttpConfig()) as http:
            reader = LocalReader(http, ReaderConfig())
            for url in (server.url, "file:///etc/passwd", f"http://localhost:{server.port}/"):
                with pytest.raises(ToolError, match="^refused"):
                    await reader.read(url, 5.0)
            assert not server.heads

    asyncio.run(run())


def test_one_deadline_for_fetching_and_parsing():
    async def hang(head, reader, writer):
        await asyncio.sleep(60)

    error, _ = read(hang, deadline=0.3)
    assert str(error).startswith("timeout: 0.3 s are over")


def flate_bomb():
    """A PDF whose page is 60 MB of drawing commands in 60 KB."""
    data = zlib.compress(b"0 0 m " * 10_000_000, 9)
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(100, 100)
    name = pypdf.generic.NameObject
    stream = pypdf.generic.StreamObject()
    stream._data = data
    stream[name("/Filter")] = name("/FlateDecode")
    page[name("/Contents")] = writer._add_object(stream)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_a_pdf_bomb_costs_a_deadline_at_most_and_the_next_page_is_read():
    """pypdf may refuse the bomb, or work on it for long; either way the pool goes on."""
    body = flate_bomb()
    assert len(body) < 100_000

    async def run():
        parsers = Parsers(size=1)
        try:
            title, _ = await parsers.parse("html", ARTICLE.encode(), deadline=20)
            assert title == "Nepal & its flag"
            pids = {worker.process.pid for worker in parsers._all}
            with pytest.raises(ToolError, match="^(timeout|too_large|no_text|bad_response)"):
                await parsers.parse("pdf", body, deadline=1.0)
            title, _ = await parsers.parse("html", ARTICLE.encode(), deadline=20)
            assert title == "Nepal & its flag"
            assert len(parsers._all) == 1 and len(pids) == 1
        finally:
            await parsers.close()

    asyncio.run(run())


HANGS = """
import json, os, struct, sys, time
out = os.fdopen(os.dup(1), "wb", buffering=0)
while True:
    size = struct.unpack(">Q", sys.stdin.buffer.read(8))[0]
    job = json.loads(sys.stdin.buffer.read(size))
    body = sys.stdin.buffer.read(job["length"])
    if body == b"hang":
        time.sleep(60)
    if body == b"die":
        os.kill(os.getpid(), 11)
    if body == b"killed":
        os.kill(os.getpid(), 9)
    if body == b"exit":
        sys.exit(0)
    if body == b"babble":
        out.write(b"what a strange answer to a job")
    if body == b"huge":
        out.write(struct.pack(">Q", 1 << 60))
    if body == b"job":
        body = json.dumps(job).encode()
    if body == b"env":
        body = json.dumps(dict(os.environ)).encode()
    reply = json.dumps({"title": str(os.getpid()), "text": body.decode()}).encode()
    out.write(struct.pack(">Q", len(reply)) + reply)
"""


@pytest.fixture
def odd_parser(tmp_path, monkeypatch):
    """Instead of our parser, one that does what its page says."""
    program = tmp_path / "odd.py"
    program.write_text(HANGS)
    monkeypatch.setattr(workers, "PROGRAM", program)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("page", ["hang", "die", "killed", "exit", "babble", "huge"])
def test_a_parser_that_breaks_is_replaced(odd_parser, page):
    async def run():
        parsers = Parsers(size=1)
        first, _ = await parsers.parse("text", b"x", deadline=20)
        again, _ = await parsers.parse("text", b"x", deadline=20)
        assert first == again  # one process for many pages
        kind = {
            "hang": "timeout: 0.3 s are over",
            "killed": "failed: the parser was killed",  # short of memory: another time it may work
        }.get(page, "bad_response: the page ends its")
        with pytest.raises(ToolError, match=f"^{kind}"):
            await parsers.parse("text", page.encode(), deadline=0.3 if page == "hang" else 20)
        second, text = await parsers.parse("text", b"y", deadline=20)
        assert second != first and text == "y" and len(parsers._all) == 1
        await parsers.close()
        for _ in range(100):
            if not alive(first) and not alive(second):
                break
            await asyncio.sleep(0.05)
        assert not alive(first) and not alive(second)

    asyncio.run(run())


def test_waiting_for_a_parser_counts_and_leaving_kills_it(odd_parser):
    async def run():
        parsers = Parsers(size=1)
        hanging = asyncio.ensure_future(parsers.parse("text", b"hang", deadline=60))
        await asyncio.sleep(0.3)
        with pytest.raises(ToolError, match="^timeout: 0.2 s are over"):
            await parsers.parse("text", b"x", deadline=0.2)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert (await parsers.parse("text", b"x", deadline=20))[1] == "x"
        await parsers.close()

    asyncio.run(run())


def test_parsers_see_no_keys(odd_parser, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)

    async def run():
        parsers = Parsers(size=1)
        _, text = await parsers.parse("text", b"env", deadline=20)
        await parsers.close()
        return text

    text = asyncio.run(run())
    assert KEY not in text and "PATH" in text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_memory_of_a_parser_is_limited():
    async def run():
        parsers = Parsers(size=1, memory=300 << 20)
        try:
            with pytest.raises(ToolError, match="^(too_large: .*memory|bad_response)"):
                await parsers.parse("text", b"\xff" * (100 << 20), deadline=30, charset="utf-16")
            assert (await parsers.parse("text", b"x", deadline=20))[1] == "x"
        finally:
            await parsers.close()

    asyncio.run(run())


def test_a_pool_of_nothing():
    with pytest.raises(ValueError, match="at least 1 parser, not 0"):
        Parsers(size=0)


def jina(**answer):
    import json

    return always(body=json.dumps(answer).encode())


def test_jina_reader_speaks_the_documented_language(monkeypatch):
    monkeypatch.setenv("JINA_API_KEY", f"{KEY}\n")  # as a file has it
    data = {"title": "Nepal", "url": "https://np.example/x", "content": " # Nepal\n\ntext ", "n": 1}
    page, server = read(
        jina(code=200, status=20000, data=data),
        JinaReader,
        path="https://np.example/x?a=b c#d",
        deadline=15,
    )
    assert (page.url, page.title, page.text) == ("https://np.example/x", "Nepal", "# Nepal\n\ntext")
    (head,) = server.heads
    assert path(head) == "/https://np.example/x?a=b%20c" and head.startswith("GET ")
    assert header(head, "authorization") == f"Bearer {KEY}"
    assert header(head, "accept") == "application/json"
    assert header(head, "x-timeout") == "14" and header(head, "x-retain-images") == "none"


def test_jina_reader_without_a_key_and_with_the_early_format(monkeypatch):
    monkeypatch.delenv("JINA_API_KEY", raising=False)
    answer = jina(url="https://np.example/", title=None, content="text")
    page, server = read(answer, JinaReader, path="https://np.example/")
    assert page.text == "text" and page.title == ""
    assert header(server.heads[0], "authorization") is None


@pytest.mark.parametrize(
    "handler, text",
    [
        (always(401, KEY.encode(), "text/plain"), "unauthorized: HTTP 401: ***"),
        (always(402, b'{"code": 402}'), "quota: HTTP 402"),
        (always(429), "rate_limited: HTTP 429"),
        (always(451), "bad_response: HTTP 451"),
        (always(500), "server_error: HTTP 500"),
        (always(body=b'{"data": {"cont'), "bad_response: broken JSON"),
        (always(body=b"<html>", content_type="text/html"), "bad_response: JSON expected"),
        (jina(code=200, data=None), "bad_response: Jina's answer has no data.content"),
        (jina(code=200, data={"content": 5}), "bad_response: Jina's answer has no data.content"),
        (always(body=b"[]"), "bad_response: Jina's answer has no data.content"),
        (jina(code=200, data={"content": "  "}), "no_text: Jina found no text"),
    ],
)
def test_jina_reader_errors(handler, text, monkeypatch):
    monkeypatch.setenv("JINA_API_KEY", KEY)
    error, _ = read(handler, JinaReader, path="https://np.example/")
    assert str(error).startswith(text) and KEY not in str(error)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "http://localhost/", "file:///x", "http://wiki/"]
)
def test_jina_does_not_hear_of_private_addresses(url):
    error, server = read(always(), JinaReader, path=url)
    assert error.kind == "refused" and not server.heads


def test_content_types():
    assert charset("text/html; boundary=x; Charset = 'UTF-8' ") == "UTF-8"
    assert charset("text/html") == charset("text/html; charset") == ""
    assert page_kind(b" <!DOCTYPE HTML><p>", "") == "html"
    assert page_kind(b"{}", "application/json; charset=utf-8") == "text"
    assert page_kind(b"\n%PDF-1.4", "") == "pdf"


def test_readers_are_made_by_their_names(monkeypatch):
    assert isinstance(make_reader(None, ReaderConfig(kind="jina")), JinaReader)
    assert isinstance(make_reader(None, ReaderConfig()), LocalReader)
    monkeypatch.setitem(sys.modules, "playwright", None)
    monkeypatch.setitem(sys.modules, "playwright.async_api", None)
    with pytest.raises(ValueError, match=r"pip install 'mmsr-jax\[browser\]'"):
        make_reader(None, ReaderConfig(kind="browser"))
    assert browser_lib.BrowserReader.provider == "browser"


def test_a_page_does_not_get_the_whole_of_a_long_deadline(odd_parser):
    async def run():
        parsers = Parsers(size=1)
        try:
            for deadline, seconds in ((100.0, workers.CPU_SECONDS), (2.5, 2.5)):
                _, job = await parsers.parse("html", b"job", deadline=deadline)
                assert json.loads(job)["seconds"] == seconds
        finally:
            await parsers.close()

    asyncio.run(run())


def test_a_page_that_has_used_its_seconds_ends_its_parser(tmp_path, monkeypatch):
    """The real limit, in a parser that does nothing but compute."""
    monkeypatch.setattr(workers, "CPU_SECONDS", -2.0)  # two more are given, so none
    program = tmp_path / "busy.py"
    real = workers.PROGRAM.read_text()
    program.write_text(
        real.replace("def answer(", "def answer(job, body):\n    while True: 1\n\n\ndef _(", 1)
    )
    monkeypatch.setattr(workers, "PROGRAM", program)

    async def run():
        parsers = Parsers(size=1)
        try:
            with pytest.raises(ToolError, match="bad_response: the page ends its parser"):
                await parsers.parse("html", b"x", deadline=60)
        finally:
            await parsers.close()

    asyncio.run(run())
