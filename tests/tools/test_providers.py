"""Every provider against a server on a real socket that speaks the documented format.

Names of fields: serpapi.com/search-api, serpapi.com/google-lens-api, serpapi.com/api-errors,
serper.dev/playground, docs.searxng.org/dev/search_api.html, jina.ai/reader, Search-R1's
retrieval_server.py, and our own `mmsr search serve`.
"""

import asyncio
import base64
import json
import logging
import urllib.parse

import pytest
from fault_server import FaultServer, always, header, path, reset, response

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.http import Http, HttpConfig
from mmsr_jax.tools.providers import answers
from mmsr_jax.tools.providers.jina import JinaSearchConfig, JinaText
from mmsr_jax.tools.providers.retriever import RetrieverConfig, RetrieverImages, RetrieverText
from mmsr_jax.tools.providers.searxng import SearxngConfig, SearxngText
from mmsr_jax.tools.providers.serpapi import SerpApiConfig, SerpApiLens, SerpApiText, lens_hits
from mmsr_jax.tools.providers.serper import SerperConfig, SerperLens, SerperText

KEY = "sk-very-secret-0123456789"
PUBLISHED = "https://pictures.example/abc.png"
LINKS = [
    ("Nepal - Wikipedia", "https://en.wikipedia.org/wiki/Nepal", "A country in Asia."),
    ("Kathmandu", "https://www.britannica.com/place/Kathmandu", "Capital of Nepal."),
]
MATCHES = [
    ("Flag of Nepal", "https://flags.example/np", "https://t.example/1.jpg"),
    ("Nepal", "https://np.example", "https://t.example/2.jpg"),
]


class Uploader:
    async def publish(self, picture):
        assert picture == b"picture"
        return PUBLISHED


def serpapi(name, entries, status="Success", **more):
    return {
        "search_metadata": {"id": "65", "status": status, "total_time_taken": 1.2},
        "search_parameters": {"engine": "google", "q": "Nepal"},
        **({name: entries} if entries else {}),
        **more,
    }


ORGANIC = [
    {"position": n, "title": t, "link": u, "displayed_link": u[:20], "snippet": s, "source": "x"}
    for n, (t, u, s) in enumerate(LINKS, 1)
]
VISUAL = [
    {"position": n, "title": t, "link": u, "source": "x", "thumbnail": p, "image": p + "?full"}
    for n, (t, u, p) in enumerate(MATCHES, 1)
]
SERPER_ORGANIC = [
    {"title": t, "link": u, "snippet": s, "position": n} for n, (t, u, s) in enumerate(LINKS, 1)
]
SERPER_LENS = [
    {"title": t, "source": "x", "link": u, "imageUrl": p + "?full", "thumbnailUrl": p}
    for t, u, p in MATCHES
]
SEARXNG = [
    {"url": u, "title": t, "content": s, "engine": "google", "engines": ["google"], "score": 1.0,
     "category": "general", "parsed_url": ["https", "x", "/", "", "", ""]}
    for t, u, s in LINKS
]  # fmt: skip
JINA = [{"title": t, "url": u, "description": s, "usage": {"tokens": 1000}} for t, u, s in LINKS]
DOCUMENTS = [
    {"document": {"id": "1", "contents": '"Nepal"\nA country.', "link": "np"}, "score": 0.9},
    {"document": {"id": "2", "title": "Niger", "text": "Niamey.", "contents": '"Niger"\nx'}},
    {"id": "3", "contents": "only a passage"},
]
B64 = base64.b64encode(b"thumbnail").decode()

# name: (provider's maker, good answer, empty answer, price of a good call)
CASES = {
    "serpapi": (
        lambda url, http: SerpApiText(SerpApiConfig(url), http, KEY),
        serpapi("organic_results", ORGANIC),
        serpapi("organic_results", [], error="Google hasn't returned any results for this query."),
        0.015,
    ),
    "serpapi_lens": (
        lambda url, http: SerpApiLens(SerpApiConfig(url), http, KEY, Uploader()),
        serpapi("visual_matches", VISUAL),
        serpapi("visual_matches", [], error="Google Lens hasn't returned any results for this."),
        0.015,
    ),
    "serper": (
        lambda url, http: SerperText(SerperConfig(url), http, KEY),
        {"searchParameters": {"q": "Nepal", "gl": "us", "hl": "en", "type": "search"},
         "organic": SERPER_ORGANIC, "peopleAlsoAsk": [], "credits": 1},
        {"searchParameters": {"q": "Nepal"}, "organic": [], "credits": 1},
        0.001,
    ),
    "serper_lens": (
        lambda url, http: SerperLens(SerperConfig(url), http, KEY, Uploader()),
        {"searchParameters": {"url": PUBLISHED, "type": "lens"}, "organic": SERPER_LENS,
         "credits": 3},
        {"searchParameters": {"url": PUBLISHED, "type": "lens"}, "organic": [], "credits": 3},
        0.003,
    ),
    "searxng": (
        lambda url, http: SearxngText(SearxngConfig(url, engines="google"), http),
        {"query": "Nepal", "number_of_results": 2, "results": SEARXNG, "answers": [],
         "corrections": [], "infoboxes": [], "suggestions": [], "unresponsive_engines": []},
        {"query": "Nepal", "number_of_results": 0, "results": [], "unresponsive_engines": []},
        0.0,
    ),
    "jina": (
        lambda url, http: JinaText(JinaSearchConfig(url), http, KEY),
        {"code": 200, "status": 20000, "data": JINA, "meta": {"usage": {"tokens": 10000}}},
        {"code": 200, "status": 20000, "data": []},
        0.0005,
    ),
    "retriever": (
        lambda url, http: RetrieverText(RetrieverConfig(url), http),
        {"result": [DOCUMENTS]},
        {"result": [[]]},
        0.0,
    ),
    "retriever_images": (
        lambda url, http: RetrieverImages(RetrieverConfig(url), http),
        {"result": [{"title": "Flag of Nepal", "link": "np", "score": 0.9, "thumbnail": B64},
                    {"title": "Nepal", "link": "", "score": 0.5, "thumbnail": B64}]},
        {"result": []},
        0.0,
    ),
}  # fmt: skip
PICTURES = ("serpapi_lens", "serper_lens", "retriever_images")


def ask(name, handler, count=5, deadline=10.0, retries=0, seen=None):
    """One search through a real socket; what was asked goes into `seen`."""

    async def main():
        config = HttpConfig(retries=retries, backoff=0.01)
        async with FaultServer(handler) as server, Http(config) as http:
            provider = CASES[name][0](server.url, http)
            asked = b"picture" if name in PICTURES else "capital of Nepal & more"
            try:
                return await provider.search(asked, count, deadline)
            finally:
                if seen is not None:
                    seen.extend(zip(server.heads, server.bodies, strict=True))

    return asyncio.run(main())


def answering(content, status=200, **more):
    return always(status, json.dumps(content).encode(), **more)


@pytest.mark.parametrize("name", CASES)
def test_a_documented_answer_becomes_hits(name):
    _, good, _, price = CASES[name]
    found = ask(name, answering(good))
    if name == "retriever":
        texts = [(h.title, h.link, h.text) for h in found.hits]
        assert texts == [
            ("Nepal", "np", "A country."), ("Niger", "", "Niamey."), ("", "", "only a passage"),
        ]  # fmt: skip
    elif name == "retriever_images":
        shown = [(h.title, h.link, h.picture) for h in found.hits]
        assert shown == [("Flag of Nepal", "np", b"thumbnail"), ("Nepal", "", b"thumbnail")]
    elif name in PICTURES:
        assert [(h.title, h.link, h.thumbnail) for h in found.hits] == MATCHES
    else:
        assert [(h.title, h.link, h.text) for h in found.hits] == LINKS
    assert found.cost == pytest.approx(price) and found.complete
    assert len(ask(name, answering(good), count=1).hits) == 1


@pytest.mark.parametrize("name", CASES)
def test_no_results_are_an_answer_and_cost_what_they_cost(name):
    _, _, empty, price = CASES[name]
    found = ask(name, answering(empty))
    assert found.hits == () and found.cost == pytest.approx(price) and found.complete


EXPECTED = {
    "serpapi": ("GET", "/search.json", {
        "engine": "google", "q": "capital of Nepal & more", "hl": "en", "gl": "us", "api_key": KEY,
    }),
    "serpapi_lens": ("GET", "/search.json", {
        "engine": "google_lens", "url": PUBLISHED, "hl": "en", "country": "us", "api_key": KEY,
        "type": "visual_matches",
    }),
    "serper": ("POST", "/search", {"q": "capital of Nepal & more", "gl": "us", "hl": "en"}),
    "serper_lens": ("POST", "/lens", {"url": PUBLISHED, "gl": "us", "hl": "en"}),
    "searxng": ("GET", "/search", {
        "q": "capital of Nepal & more", "format": "json", "language": "en", "engines": "google",
        "categories": "general", "safesearch": "0",
    }),
    "jina": ("GET", "/", {"q": "capital of Nepal & more", "gl": "us", "hl": "en"}),
    "retriever": ("POST", "/retrieve", {
        "queries": ["capital of Nepal & more"], "topk": 5, "return_scores": True,
    }),
    "retriever_images": ("POST", "/image", {
        "image": base64.b64encode(b"picture").decode(), "topk": 5,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_is_what_is_documented(name):
    seen = []
    ask(name, answering(CASES[name][1]), seen=seen)
    ((head, body),) = seen
    method, where, content = EXPECTED[name]
    split = urllib.parse.urlsplit(path(head))
    assert head.startswith(method + " ") and split.path == where
    if method == "GET":
        assert dict(urllib.parse.parse_qsl(split.query)) == content and not body
    else:
        assert json.loads(body) == content
        assert header(head, "content-type") == "application/json"
    if name.startswith("serper"):
        assert header(head, "x-api-key") == KEY
    if name == "jina":
        assert header(head, "authorization") == f"Bearer {KEY}"
        assert header(head, "accept") == "application/json"
        assert header(head, "x-respond-with") == "no-content"


async def hang(head, reader, writer):
    await asyncio.sleep(30)


async def broken_off(head, reader, writer):
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    await writer.drain()
    reset(writer)


async def cut_short(head, reader, writer):
    writer.write(response(200, json.dumps(CASES["serpapi"][1]).encode()[:80]))


FAULTS = {
    "401": (answering({"error": f"Invalid API key {KEY}"}, 401), "unauthorized"),
    "403": (answering({"message": "Unauthorized."}, 403), "unauthorized"),
    "402": (answering({"code": 402, "name": "InsufficientBalanceError"}, 402), "quota"),
    "429": (answering({"error": "slow down"}, 429, retry_after="60"), "rate_limited"),
    "500": (answering({"error": KEY}, 500), "server_error"),
    "hang": (hang, "timeout"),
    "reset": (broken_off, "unreachable"),
    "truncated JSON": (cut_short, "bad_response"),
    "wrong type": (always(200, b"<html>hello</html>", "text/html"), "bad_response"),
    "no object": (answering([1, 2]), "bad_response"),
    "deep": (always(200, b"[" * 100_000), "bad_response"),
    "404": (answering({"detail": "Not Found"}, 404), "bad_response"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
def test_every_fault_has_its_name_and_shows_no_key(name, fault, caplog):
    handler, kind = FAULTS[fault]
    with caplog.at_level(logging.DEBUG), pytest.raises(ToolError) as raised:
        ask(name, handler, deadline=0.3 if fault == "hang" else 10.0)
    assert raised.value.kind == kind
    if name in ("searxng", "retriever", "retriever_images"):
        return  # they have no key: the server made this one up
    seen: BaseException | None = raised.value
    while seen is not None:
        assert KEY not in str(seen)
        seen = seen.__cause__ or seen.__context__
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("name", "status", "content", "kind"),
    [
        ("serpapi", 429, {"error": "Your account has run out of searches."}, "quota"),
        ("serpapi_lens", 429, {"error": "Your account has run out of searches."}, "quota"),
        ("serper", 400, {"message": "Not enough credits", "statusCode": 400}, "quota"),
        ("serper_lens", 400, {"message": "Not enough credits", "statusCode": 400}, "quota"),
        ("serpapi", 200, serpapi("x", [], "Error", error="try later"), "server_error"),
        ("serpapi", 200, serpapi("x", [], "Processing"), "bad_response"),
        ("serpapi", 200, {}, "bad_response"),
        ("searxng", 403, {"error": "Forbidden"}, "unauthorized"),
        ("searxng", 200, {"results": [], "unresponsive_engines": [["google", "CAPTCHA"]]},
         "server_error"),
        ("serper", 200, {"organic": {"title": "x"}}, "bad_response"),
        ("retriever", 200, {"result": [[], []]}, "bad_response"),
        ("retriever", 200, {"result": {}}, "bad_response"),
        ("retriever_images", 200, {"result": [{"title": "x", "thumbnail": "?"}]}, "bad_response"),
    ],
)  # fmt: skip
def test_what_a_service_says_in_its_own_way(name, status, content, kind):
    with pytest.raises(ToolError) as raised:
        ask(name, answering(content, status))
    assert raised.value.kind == kind


def test_what_serpapi_has_cached_is_free():
    assert ask("serpapi", answering(serpapi("organic_results", ORGANIC, "Cached"))).cost == 0


def test_an_uploader_that_hangs_costs_no_more_than_the_deadline(monkeypatch):
    async def never(self, picture):
        await asyncio.sleep(30)

    monkeypatch.setattr(Uploader, "publish", never)
    seen = []
    for name in ("serpapi_lens", "serper_lens"):
        with pytest.raises(ToolError, match="timeout: the picture could not be published"):
            ask(name, answering(CASES[name][1]), deadline=0.1, seen=seen)
    assert seen == []


def test_jina_says_with_a_422_that_there_is_nothing():
    words = {"code": 422, "message": "No search results available for query xyz"}
    assert ask("jina", answering(words, 422)).hits == ()
    with pytest.raises(ToolError, match="bad_response"):
        ask("jina", answering({"code": 422, "message": "Invalid query"}, 422))


@pytest.mark.parametrize("name", ["serper", "serpapi", "jina", "searxng"])
def test_odd_entries_are_left_out(name):
    field, link = {
        "serper": ("organic", "link"), "serpapi": ("organic_results", "link"),
        "jina": ("data", "url"), "searxng": ("results", "url"),
    }[name]  # fmt: skip
    odd = [
        None, 3, "x", [], {}, {link: None}, {link: "javascript:alert(1)", "title": "x"},
        {link: "file:///etc/passwd"}, {link: "https://a", "title": 5}, {link: "https://a"},
        {link: ["https://b"]},
    ]  # fmt: skip
    content = dict(CASES[name][1]) | {field: odd}
    assert [(h.title, h.link) for h in ask(name, answering(content)).hits] == [
        ("https://a", "https://a")
    ]


def test_a_good_answer_after_two_faults():
    script = [response(503), response(429, b"{}", Retry_After="0")]

    async def handler(head, reader, writer):
        good = response(200, json.dumps(CASES["serper"][1]).encode())
        writer.write(script.pop(0) if script else good)

    seen = []
    assert len(ask("serper", handler, retries=2, seen=seen).hits) == 2 and len(seen) == 3


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x",
        "https://",
        "serper.dev",
        "https://me:secret@host/",
        "file:///x",
        "https://host/?token=secret",
        "https://host/#secret",
        "me:secret@host",
        "http://[::1",
    ],
)
def test_addresses_that_are_none_or_hold_a_password_are_refused(url):
    with pytest.raises(ValueError, match="the address of S") as raised:
        answers.base_url(url, "S")
    assert "secret" not in str(raised.value)


def test_two_retrievers_without_a_name_do_not_share_their_answers():
    def identity(url, index=""):
        return RetrieverText(RetrieverConfig(url, index), None).identity

    assert identity("http://a.example") != identity("http://b.example")
    assert identity("http://a.example/") == identity("http://a.example")
    assert identity("http://a.example", "v1") == identity("http://b.example", "v1")
    assert identity("http://a.example", "v1") != identity("http://a.example", "v2")


def test_a_thumbnail_in_the_answer_comes_whole_or_not_at_all():
    data = "data:image/png;base64," + "A" * 40_000
    entry = {"thumbnail": data, "image": "https://i.example/1.png"}
    assert answers.address(entry, "thumbnail", "image") == data
    entry["thumbnail"] = "data:image/png;base64," + "A" * answers.MAX_INLINE
    assert answers.address(entry, "thumbnail", "image") == "https://i.example/1.png"
    found = {"organic": [{"title": "t", "link": "https://" + "x" * 5000, "thumbnailUrl": data}]}
    (hit,) = lens_hits(found, "organic", "Serper")
    assert hit.thumbnail == data and hit.link == ""
    assert answers.links([{"link": "https://" + "x" * 5000}], "title", "link", "text") == []


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.setenv("SOME_KEY", " ")
    with pytest.raises(ValueError, match="environment variable SOME_KEY"):
        answers.key("SOME_KEY", "Serper")
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert answers.key("SOME_KEY", "Serper") == KEY
