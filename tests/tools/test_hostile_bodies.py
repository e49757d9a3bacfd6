"""Bodies that nobody would write on purpose, or somebody would: a result or a `ToolError`."""

import asyncio
import io
import json
import urllib.parse

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_pages import pdf

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.decoders import web_formats
from mmsr_jax.tools.guard import Guard, not_public
from mmsr_jax.tools.http import Http, HttpConfig, HttpRequest, HttpResponse
from mmsr_jax.tools.limits import Limits
from mmsr_jax.tools.pages import Page, ReaderConfig
from mmsr_jax.tools.pictures import PictureLimits, reencode
from mmsr_jax.tools.reader import JinaReader
from mmsr_jax.tools.summarize import ChatSummarizer, ExtractSummarizer, SummarizeConfig
from mmsr_jax.tools.workers import Parsers

FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,  # the same bodies in every run
    suppress_health_check=list(HealthCheck),
)
UNLIMITED = HttpConfig(
    retries=0, default_limits=Limits(rate=1e6, burst=10**6, breaker_failures=10**6)
)

HTML = (
    b"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>A title</title><style>p{}"
    b"</style></head><body><h1>Head</h1><p>Some words, &amp; more &#x41; &nbsp; words.</p><table>"
    b"<tr><td>1<td>2</table><ul><li>a<li>b</ul><a href='x'>l</a><!-- c --><script>1<2</script>"
)
TAGS = ["p", "div", "table", "tr", "td", "ul", "li", "a", "svg", "math", "template", "title", "br"]
TAGS += ["script", "style", "plaintext", "iframe", "select", "form", "b", "x-y", "!--", "![CDATA["]


def sample_pictures():
    for kind in web_formats():
        out = io.BytesIO()
        Image.effect_noise((17, 13), 90).convert("RGB").save(out, kind)
        yield out.getvalue()


@st.composite
def damaged(draw, samples):
    """A good body with some of it changed, cut, doubled or moved."""
    body = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(0, len(body) - 1)))
        end = min(len(body), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64])))
        new = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([b"", b"\xff" * 4, bytes(4), b"<", b">>", b"endobj", b"9" * 20]),
                st.just(bytes(body[start : start + 200])),
            )
        )
        body[start:end] = new
    return bytes(body)


@st.composite
def tag_soup(draw):
    pieces = st.one_of(
        st.sampled_from(TAGS).map(lambda tag: f"<{tag}>"),
        st.sampled_from(TAGS).map(lambda tag: f"</{tag}>"),
        st.sampled_from(TAGS).map(lambda tag: f"<{tag} " * 50),
        st.sampled_from(["&#0;", "&#x110000;", "&nosuch;", "\0", "\ud800", "<", '="', "--", "]]>"]),
        st.text(max_size=20),
    )
    soup = "".join(draw(st.lists(pieces, max_size=40))) * draw(st.sampled_from([1, 1, 1, 300]))
    return soup.encode(draw(st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-7"])), "replace")


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def parsers(runner):
    pool = Parsers(size=1)
    yield pool
    runner.run(pool.close())


@pytest.fixture
def tally(request):
    counts = {}
    yield counts
    print(f"\n{request.node.name}: {counts}")
    assert counts.get("result", 0) > 0, f"nothing but errors: {counts}"


def outcome(runner, work, tally):
    """Runs it to its result, or None for a `ToolError`; anything else is a failure of the test."""
    try:
        found = runner.run(work)
    except ToolError as error:
        tally[error.kind] = tally.get(error.kind, 0) + 1
        return None
    tally["result"] = tally.get("result", 0) + 1
    return found


CHARSETS = [
    "",
    "utf-8",
    "utf-16",
    "shift_jis",
    "utf-7",
    "idna",
    "punycode",
    "hex",
    "unicode_escape",
]


def test_html(runner, parsers, tally):
    @FUZZ
    @given(
        st.one_of(tag_soup(), damaged([HTML]), st.binary(max_size=300)), st.sampled_from(CHARSETS)
    )
    def fuzz(body, charset):
        found = outcome(runner, parsers.parse("html", body, charset=charset, deadline=20), tally)
        if found:
            title, text = found
            assert text.strip() and len(title) <= 300 and "\0" not in text
            (title + text).encode("utf-8")

    fuzz()
    assert sum(tally.values()) >= 250


def test_pdf(runner, parsers, tally):
    samples = [pdf("Words on a page", "More"), pdf("Words", compress=True)]

    @FUZZ
    @given(st.one_of(damaged(samples), damaged(samples), st.binary(max_size=200)))
    def fuzz(body):
        found = outcome(runner, parsers.parse("pdf", body, deadline=20), tally)
        if found:
            "".join(found).encode("utf-8")

    fuzz()
    assert sum(tally.values()) >= 250


def test_pictures(runner, tally):
    samples = list(sample_pictures())
    limits = PictureLimits(max_pixels=1_000_000, max_side=64)

    @FUZZ
    @given(st.one_of(damaged(samples), damaged(samples), st.binary(max_size=200)))
    def fuzz(body):
        found = outcome(runner, asyncio.to_thread(reencode, body, limits), tally)
        if found:
            image = Image.open(io.BytesIO(found), formats=("PNG", "JPEG"))
            assert image.mode == "RGB" and max(image.size) <= 64

    fuzz()
    assert sum(tally.values()) >= 250


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
)


def test_json(runner, tally):
    good = json.dumps({"a": [1, -2.5e3, None, True, "x\ud800 é"], "b": {"c": []}}).encode()

    @FUZZ
    @given(
        st.one_of(
            damaged([good]),
            st.binary(max_size=100),
            JSON.map(lambda value: json.dumps(value).encode()),
            st.integers(0, 4000).map(lambda depth: b"[" * depth * 50 + b"]" * depth * 50),
        ),
        st.sampled_from(["application/json", "application/problem+json;x", "text/html", ""]),
    )
    def fuzz(body, kind):
        async def parse():
            return [HttpResponse(200, {"content-type": kind}, body, "").json()]

        found = outcome(runner, parse(), tally)
        if found:
            json.dumps(found, ensure_ascii=False).encode("utf-8")

    fuzz()
    assert sum(tally.values()) >= 250


def shapes(*keys):
    """JSON that has, at every level of an answer, the right thing or any other."""
    value = JSON | st.text(min_size=1, max_size=30)
    for key in reversed(keys):
        value = value | (
            st.lists(value, max_size=2) if key == 0 else st.fixed_dictionaries({key: value}) | JSON
        )
    return value


def test_answers_of_services(runner, tally):
    """What Jina and a chat server may say instead of what they should."""
    answers = []

    def handler(request):
        return httpx.Response(
            200, content=json.dumps(answers[-1]), headers={"Content-Type": "application/json"}
        )

    http = Http(UNLIMITED, transport=httpx.MockTransport(handler))
    jina = JinaReader(http, ReaderConfig(kind="jina"))
    chat = ChatSummarizer(http, SummarizeConfig(base_url="http://chat.example/v1"))
    extract = ExtractSummarizer()

    @FUZZ
    @given(shapes("data", "content") | shapes("choices", 0, "message", "content"), st.text())
    def fuzz(answer, query):
        answers.append(answer)
        page = outcome(runner, jina.read("https://page.example/", 20.0), tally)
        page = page or Page("u", query, query)
        for summarizer in (chat, extract):
            found = outcome(runner, summarizer.summarize(query, query, page, 20.0), tally)
            assert found is None or (found.strip() and len(found) <= 1500)

    fuzz()
    assert sum(tally.values()) >= 750


PIECES = [
    "http://",
    "https://",
    "//",
    ":",
    "@",
    "/",
    "\\",
    "?",
    "#",
    "%",
    "[",
    "]",
    "::1",
    ".",
    "0x",
]
PIECES += [
    "127.0.0.1",
    "10.1",
    "example.com",
    "localhost",
    "8.8.8.8",
    "%00",
    "\t",
    "。",
    "ⓔ",
    "ß",
    "٠",
]


def test_urls(runner, tally):
    """Whatever passes the guard is read alike by other parsers, and leads to where was checked."""

    async def resolve(host, port):
        return ["8.8.8.8"]

    guard = Guard(resolve=resolve)
    sent = []

    def handler(request):
        sent.append(request)
        return httpx.Response(200)

    http = Http(UNLIMITED, transport=httpx.MockTransport(handler), resolve=resolve)
    pieces = st.sampled_from(PIECES) | st.text(max_size=3)

    @FUZZ
    @given(
        st.lists(pieces, max_size=8).map("".join),
        st.sampled_from(["", "http://", "http://example.com", "https://8.8.8.8"]),
    )
    def fuzz(tail, start):
        url = start + tail
        target = outcome(runner, guard.check(url), tally)
        sent.clear()
        outcome(runner, http.send(HttpRequest("web", "GET", url, public_only=True)), {})
        if target is None:
            assert not sent
            return
        parts = urllib.parse.urlsplit(target.url)
        assert (parts.scheme, parts.hostname) == (target.scheme, target.host)
        assert (parts.port or {"http": 80, "https": 443}[parts.scheme]) == target.port
        assert parts.username is None and not not_public(target.addresses[0])
        for request in sent:
            assert request.url.host in target.addresses
            assert request.headers["host"].partition(":")[0] == target.host

    fuzz()
    assert sum(tally.values()) >= 250
