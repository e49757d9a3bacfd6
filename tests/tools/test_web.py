"""The pipelines on the web: who fails is replaced, all ends in time, nothing is paid twice."""

import asyncio
import base64
import functools
import threading
import time

import pytest

from mmsr_jax.tools import web
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.budget import Budget
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.image_search import DECODERS, WebImageSearch
from mmsr_jax.tools.pictures import PictureLimits
from mmsr_jax.tools.reader import Page
from mmsr_jax.tools.recorded import Recorded, Recorder
from mmsr_jax.tools.store import Store
from mmsr_jax.tools.web import Stage, WebTextSearch
from mmsr_jax.types import ToolCall

CALL = ToolCall("text_search", "capital of Nepal", b"picture", "What is its capital?")


class Provider:
    name, price, passages = "serper", 0.001, False
    identity = {"engine": "test"}

    def __init__(self, hits):
        self.hits, self.calls = hits, 0

    async def search(self, query, count, deadline):
        self.calls += 1
        return Found(tuple(self.hits[:count]), self.price, provider=self.name)


class Reader:
    """Pages by number in the link; some fail, some take their time."""

    def __init__(self, failing=None, slow=()):
        self.failing, self.slow, self.read_urls = failing or {}, slow, []

    async def read(self, url, deadline):
        self.read_urls.append(url)
        number = int(url.rpartition("/")[2])
        await asyncio.sleep(deadline + 1 if number in self.slow else 0.01)
        if number in self.failing:
            raise ToolError(self.failing[number])
        return Page(url, f"page title {number}", f"text {number}")


class Summarizer:
    def __init__(self, useless=()):
        self.asked, self.useless = [], useless

    async def summarize(self, question, query, page, deadline):
        self.asked.append((question, query, page.text))
        if page.text in self.useless:
            raise ToolError("no_results")
        return f"summary of {page.text}"


def links(count):
    return [Hit(f"title {n}", f"https://a.example/{n}", f"snippet {n}") for n in range(count)]


def search(provider, reader, summarizer, recorder=None, **options):
    options = {"results": 3, "candidates": 6, "deadline": 5.0} | options
    return WebTextSearch(
        provider,
        reader and (reader, Stage("reader", {"kind": "test"}, 0.01)),
        summarizer and (summarizer, Stage("chat", {"model": "test"}, 0.1)),
        recorder or Recorder(),
        **options,
    )


def run(tool, call=CALL):
    return asyncio.run(tool.find(call))


def test_links_are_read_and_summarised_in_order():
    reader, summarizer = Reader(), Summarizer()
    found = run(search(Provider(links(6)), reader, summarizer))
    assert [(h.title, h.link, h.text) for h in found.hits] == [
        (f"title {n}", f"https://a.example/{n}", f"summary of text {n}") for n in range(3)
    ]
    assert len(reader.read_urls) == 3 and found.complete
    assert found.cost == found.paid == pytest.approx(0.001 + 3 * 0.11)
    assert set(summarizer.asked) == {(CALL.question, CALL.query, f"text {n}") for n in range(3)}


def test_a_page_that_fails_is_replaced_by_the_next():
    reader = Reader({0: "timeout", 2: "refused", 3: "bad_response"})
    found = run(search(Provider(links(6)), reader, Summarizer(useless=["text 1"])))
    assert [h.link[-1] for h in found.hits] == ["4", "5"]
    assert not found.complete  # two of three, and a timeout is of the moment
    found = run(search(Provider(links(6)), Reader({0: "timeout"}), Summarizer()))
    assert [h.link[-1] for h in found.hits] == ["1", "2", "3"] and found.complete


def test_pages_are_read_side_by_side_under_one_deadline():
    began = time.monotonic()
    tool = search(Provider(links(6)), Reader(slow=(1,)), Summarizer(), deadline=0.5)
    found = run(tool)
    assert time.monotonic() - began < 3
    assert [h.link[-1] for h in found.hits] == ["0", "2"] and not found.complete
    with pytest.raises(ToolError, match="timeout: none of 3 pages in time"):
        run(search(Provider(links(3)), Reader(slow=(0, 1, 2)), Summarizer(), deadline=0.3))


def test_no_links_or_only_useless_pages_are_no_results():
    for provider, useless in ((Provider([]), ()), (Provider(links(2)), ("text 0", "text 1"))):
        tool = search(provider, Reader(), Summarizer(useless))
        assert run(tool).hits == ()
        with pytest.raises(ToolError, match="^no_results$"):
            asyncio.run(tool.run(CALL))
    with pytest.raises(ToolError, match="unread: none of 2 pages: server_error"):
        run(search(Provider(links(2)), Reader(dict.fromkeys((0, 1), "server_error")), Summarizer()))


def test_without_a_reader_snippets_are_the_results():
    found = run(search(Provider(links(6)), None, None))
    assert [h.text for h in found.hits] == ["snippet 0", "snippet 1", "snippet 2"]
    assert found.cost == 0.001
    passages = Provider([Hit("np", "np", "a passage")])
    passages.passages = True
    assert run(search(passages, Reader(), Summarizer())).hits == (Hit("np", "np", "a passage"),)
    with pytest.raises(ValueError, match="a reader needs a summarizer"):
        search(Provider([]), Reader(), None)
    with pytest.raises(ValueError, match="2 candidates cannot give 3 results"):
        search(Provider([]), None, None, candidates=2)


def test_a_defect_is_shown_as_what_it_is():
    class Broken:
        async def read(self, url, deadline):
            raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        run(search(Provider(links(3)), Broken(), Summarizer()))


def test_each_stage_is_paid_for_once(tmp_path):
    """Another question with the same query asks for summaries only; a group of 8 asks once."""
    provider, reader, summarizer = Provider(links(6)), Reader(), Summarizer()
    other = ToolCall("text_search", CALL.query, CALL.image, "Who rules it?")

    async def main():
        recorder = Recorder(Store(tmp_path / "s.db"), budget=Budget(1.0))
        tool = Recorded(search(provider, reader, summarizer, recorder), recorder)
        found = await asyncio.gather(*(tool.find(CALL) for _ in range(8)))
        assert (provider.calls, len(reader.read_urls), len(summarizer.asked)) == (1, 3, 3)
        assert sum(f.paid for f in found) == pytest.approx(0.331)
        await tool.find(CALL)  # the second epoch
        assert (provider.calls, len(reader.read_urls), len(summarizer.asked)) == (1, 3, 3)
        found = await tool.find(other)
        assert (provider.calls, len(reader.read_urls), len(summarizer.asked)) == (1, 3, 6)
        assert found.paid == pytest.approx(0.3) and found.cost == pytest.approx(0.331)
        assert recorder.budget.spent == pytest.approx(0.631)
        summary = recorder.store.summary()
        assert summary["paid"] == pytest.approx(0.631)
        kinds = {kind["kind"]: kind["records"] for kind in summary["kinds"]}
        assert kinds == {"links": 1, "page": 3, "summary": 6, "text_search": 2}
        recorder.close()

    asyncio.run(main())


def test_a_summary_is_of_a_title_and_of_a_version(tmp_path, monkeypatch):
    provider, reader, summarizer = Provider(links(1)), Reader(), Summarizer()

    async def main():
        recorder = Recorder(Store(tmp_path / "s.db"))
        told = []
        for title in ("one", "two", "two"):
            provider.hits = [Hit(title, "https://a.example/0", "snippet")]
            provider.identity = {"engine": title}
            await search(provider, reader, summarizer, recorder).find(CALL)
            told.append(len(summarizer.asked))
        monkeypatch.setattr(web, "SUMMARIES", web.SUMMARIES + 1)
        changed = search(provider, reader, summarizer, recorder)
        await changed.find(CALL)
        assert told == [1, 2, 2] and len(summarizer.asked) == 3
        assert changed.identity["summaries"] == web.SUMMARIES
        recorder.close()

    asyncio.run(main())


def test_an_empty_budget_ends_the_search(tmp_path):
    budget = Budget(0.12)  # the links, and one page with its summary
    tool = search(Provider(links(6)), Reader(), Summarizer(), Recorder(budget=budget), results=2)
    with pytest.raises(ToolError) as raised:
        run(tool)
    assert raised.value.kind == "budget" and budget.stopped and budget.spent <= 0.12


class Lens:
    name, price, identity = "serper", 0.003, {"engine": "lens"}

    def __init__(self, hits):
        self.hits, self.calls = hits, 0

    async def search(self, picture, count, deadline):
        self.calls += 1
        return Found(tuple(self.hits[:count]), self.price, provider=self.name)


def matches(count):
    return [Hit(f"title {n}", f"l{n}", thumbnail=f"https://t.example/{n}") for n in range(count)]


def images(lens, fetch=None, recorder=None, **options):
    async def get(url, seconds):
        if url.endswith("/1"):
            raise ToolError("bad_response", "404")
        return url.encode()

    def clean(data):
        if data.endswith(b"/2"):
            raise ToolError("bad_picture")
        return b"clean " + data

    options = {"results": 3, "candidates": 6, "deadline": 5.0} | options
    return WebImageSearch(lens, fetch or get, clean, recorder or Recorder(), **options)


PICTURE = ToolCall("image_search", "", b"picture", "What is this?")


def test_thumbnails_are_fetched_cleaned_and_replaced():
    found = run(images(Lens(matches(6))), PICTURE)
    assert [(h.title, h.picture) for h in found.hits] == [
        (f"title {n}", f"clean https://t.example/{n}".encode()) for n in (0, 3, 4)
    ]
    assert found.complete and found.cost == 0.003
    items = asyncio.run(images(Lens(matches(6))).run(PICTURE))
    assert items[0].thumbnail == b"clean https://t.example/0"


def test_pictures_in_the_answer_are_cleaned_too():
    data = base64.b64encode(b"inline").decode()
    hits = [
        Hit("bytes", picture=b"raw"),
        Hit("inline", thumbnail=f"data:image/png;base64,{data}"),
        Hit("broken", thumbnail="data:image/png;base64,?"),
        Hit("not base64", thumbnail="data:image/svg+xml,<svg/>"),
    ]
    found = run(images(Lens(hits), results=4), PICTURE)
    assert [h.picture for h in found.hits] == [b"clean raw", b"clean inline"]


def test_no_match_is_an_answer_and_no_thumbnail_is_an_error():
    assert run(images(Lens([])), PICTURE).hits == ()

    async def unreachable(url, seconds):
        raise ToolError("unreachable")

    with pytest.raises(ToolError, match="unread: none of 4 thumbnails: unreachable"):
        run(images(Lens(matches(4)), unreachable), PICTURE)


def test_dead_thumbnails_are_an_answer_and_kept(tmp_path):
    fetched = []

    async def dead(url, seconds):
        fetched.append(url)
        raise ToolError("bad_response", "404")

    async def main():
        recorder = Recorder(Store(tmp_path / "s.db"))
        tool = Recorded(images(Lens(matches(4)), dead, recorder), recorder)
        for _ in range(2):
            with pytest.raises(ToolError, match="^no_results$"):
                await tool.find(PICTURE)
        assert len(fetched) == 4
        recorder.close()

    asyncio.run(main())


@pytest.mark.parametrize(("name", "asked"), [("retriever", 2), ("serper", 1)])
def test_what_pictures_are_cleaned_to_is_part_of_the_request(tmp_path, name, asked):
    """A retriever's pictures are cleaned before they are kept, Lens' thumbnails after."""

    def clean(data, limits):
        return str(limits.max_side).encode()

    async def get(url, seconds):
        return b"thumbnail"

    async def main():
        lens = Lens([Hit("t", picture=b"raw") if name == "retriever" else matches(1)[0]])
        lens.name = name
        recorder = Recorder(Store(tmp_path / "s.db"))
        for side in (100, 100, 200):
            cleaned = functools.partial(clean, limits=PictureLimits(max_side=side))
            tool = WebImageSearch(lens, get, cleaned, recorder, results=1, candidates=1)
            (hit,) = (await Recorded(tool, recorder).find(PICTURE)).hits
            assert hit.picture == str(side).encode()
        assert lens.calls == asked
        recorder.close()

    asyncio.run(main())


def test_few_pictures_are_decoded_at_a_time():
    now, most, lock = 0, 0, threading.Lock()

    def clean(data):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return data

    async def get(url, seconds):
        return b"thumbnail"

    async def main():
        tool = WebImageSearch(
            Lens(matches(12)), get, clean, Recorder(), results=12, candidates=12, deadline=20
        )
        return await tool.find(PICTURE)

    assert len(asyncio.run(main()).hits) == 12 and 1 <= most <= DECODERS


def test_a_paid_lens_search_is_kept_when_its_thumbnails_fail(tmp_path):
    lens, failing = Lens(matches(3)), True

    async def fetch(url, seconds):
        if failing:
            raise ToolError("unreachable")
        return b"picture"

    async def main():
        nonlocal failing
        recorder = Recorder(Store(tmp_path / "s.db"))
        tool = Recorded(images(lens, fetch, recorder), recorder)
        with pytest.raises(ToolError, match="unread"):
            await tool.find(PICTURE)
        failing = False
        found = await tool.find(PICTURE)
        assert len(found.hits) == 3 and found.paid == 0 and lens.calls == 1
        recorder.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["text", "image"])
def test_who_joined_a_search_that_ran_out_of_time_asks_once_more(kind):
    recorder, slow = Recorder(), [True]

    async def main():
        class Slow(Reader):
            async def read(self, url, deadline):
                if slow[0]:
                    await asyncio.sleep(deadline)
                    raise ToolError("timeout")
                return await super().read(url, deadline)

        async def fetch(url, seconds):
            await asyncio.sleep(60 if slow[0] else 0)
            return b"thumbnail"

        texts = search(Provider(links(3)), Slow(), Summarizer(), recorder, deadline=0.5)
        pictures = images(Lens(matches(3)), fetch, recorder, deadline=0.5)
        tool = Recorded(texts if kind == "text" else pictures, recorder)
        call = CALL if kind == "text" else PICTURE
        first = asyncio.ensure_future(tool.find(call))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(tool.find(call))
        await asyncio.sleep(0.1)
        slow[0] = False
        with pytest.raises(ToolError, match="timeout: none of 3"):
            await first
        assert (await second).hits and (await second).complete

    asyncio.run(main())
