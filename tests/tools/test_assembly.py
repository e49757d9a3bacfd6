"""From settings to tools: what clashes is named, and a replay needs nothing but the store."""

import asyncio
import base64
import dataclasses
import io
import json

import pytest
from fault_server import FaultServer, path, response
from PIL import Image

from mmsr_jax.tools import toolbox as toolbox_lib
from mmsr_jax.tools.assembly import LIMITS, Search, WebConfig, assemble
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.browser import BrowserReader
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.fvqa_cache import FvqaImageSearch
from mmsr_jax.tools.http import HttpConfig
from mmsr_jax.tools.limits import Limits
from mmsr_jax.tools.providers.jina import JinaSearchConfig
from mmsr_jax.tools.providers.retriever import RetrieverConfig
from mmsr_jax.tools.providers.searxng import SearxngConfig
from mmsr_jax.tools.providers.serpapi import SerpApiConfig
from mmsr_jax.tools.providers.serper import SerperConfig
from mmsr_jax.tools.reader import LocalReader, ReaderConfig
from mmsr_jax.tools.recorded import Recorder
from mmsr_jax.tools.store import Store, StoreConfig
from mmsr_jax.tools.summarize import SummarizeConfig
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.tools.upload import UploadConfig
from mmsr_jax.types import ResultItem, ToolCall

KEY = "sk-very-secret-0123456789"
PAGE = (
    "<html><head><title>{n}</title></head><body><article><h1>Nepal {n}</h1>"
    + (
        "<p>The capital of Nepal is Kathmandu, a city of temples in a valley, number {n}. "
        "Many travellers come here before they walk into the mountains of the north.</p>" * 3
    )
    + "</article></body></html>"
)


def png(color="red"):
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


def made(backend="web", web=None, store=None, budget=None, **more):
    options = {"image_results": 2, "text_results": 2, "deadline": 30.0, "local": dict,
               "local_identity": {}} | more  # fmt: skip
    return assemble(
        backend, web or WebConfig(), store or StoreConfig(), budget or BudgetConfig(), **options
    )


class Local:
    name = "text_search"

    async def run(self, call):
        return (ResultItem("Nepal", "np", call.query),)


def test_local_tools_are_as_they_were_unless_there_is_a_store(tmp_path):
    tool = Local()
    local = {"text_search": tool}
    search = made("local", local=lambda: local)
    assert search.tools == local and search.counters() == {}
    search.check()
    store = StoreConfig(str(tmp_path / "s.db"))
    search = made("local", store=store, local=lambda: local, local_identity={"index": 1})
    with Toolbox(search.tools, closing=search.close) as box:
        for _ in range(2):
            result = box.submit(ToolCall("text_search", "q", b"", "?")).result(10)
            assert result.items == (ResultItem("Nepal", "np", "q"),)
        assert search.counters()["tools/from_store"] == 1
    with pytest.raises(Exception, match="closed|NoneType"):
        search.recorder.store.get("x")  # the toolbox has closed it


def test_settings_that_clash_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable SERPER_API_KEY"):
        made()
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with pytest.raises(ValueError, match="needs one uploader"):
        made()
    with pytest.raises(ValueError, match=r"web.deadline is 25 s, tools.deadline 20 s"):
        made(deadline=20.0)
    with pytest.raises(ValueError, match="'fvqa' takes its picture searches from"):
        made("fvqa")
    with pytest.raises(ValueError, match="there is no store"):
        made(store=StoreConfig(str(tmp_path / "none.db"), "replay"))
    with pytest.raises(ValueError, match="not -1"):
        WebConfig(page_price=-1)
    assert not (tmp_path / "none.db").exists()


def test_fvqa_pictures_and_texts_of_the_web(tmp_path):
    web = WebConfig(text="retriever")
    search = made("fvqa", web, StoreConfig(str(tmp_path / "s.db")))
    assert isinstance(search.tools["image_search"], FvqaImageSearch)
    assert search.tools["text_search"].provider == "retriever"
    asyncio.run(search.close())


async def engine(head, reader, writer):
    """SearXNG, pages, thumbnails and an image retriever, all on one address."""
    host = next(x.partition(": ")[2] for x in head.split("\r\n") if x.lower().startswith("host:"))
    where = path(head)
    if where.startswith("/search"):
        results = [{"url": f"http://{host}/page/{n}", "title": f"Nepal {n}", "content": "x"}
                   for n in range(4)]  # fmt: skip
        writer.write(response(200, json.dumps({"results": results}).encode()))
    elif where.startswith("/page/1"):
        writer.write(response(404))
    elif where.startswith("/page/"):
        page = PAGE.format(n=where.rpartition("/")[2]).encode()
        writer.write(response(200, page, "text/html; charset=utf-8"))
    elif where.startswith("/lens"):
        organic = [{"title": f"Nepal {n}", "link": "https://np", "thumbnailUrl":
                    f"http://{host}/thumbnail/{n}"} for n in range(3)]  # fmt: skip
        writer.write(response(200, json.dumps({"organic": organic, "credits": 3}).encode()))
    elif where.startswith("/thumbnail/"):
        data = png() if where.endswith("/0") else b"GIF89a broken"
        writer.write(response(200, data, "image/png"))
    elif where.startswith("/image"):
        shown = base64.b64encode(png("blue")).decode()
        writer.write(
            response(200, json.dumps({"result": [{"title": "Nepal", "thumbnail": shown}]}).encode())
        )


TEXT = ToolCall("text_search", "capital of Nepal", b"", "What is the capital?")
IMAGE = ToolCall("image_search", "", png("green"), "What is this?")


def test_the_whole_way_over_sockets_and_again_in_a_replay(tmp_path, monkeypatch):
    """SearXNG -> pages -> sentences, Lens -> thumbnails; then the same with nobody there."""
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    store = StoreConfig(str(tmp_path / "s.db"))

    async def live():
        async with FaultServer(engine) as server:
            web = WebConfig(
                text="searxng", image="serper", searxng=SearxngConfig(server.url),
                serper=SerperConfig(server.url),
                upload=UploadConfig(folder=str(tmp_path / "p"), base_url="https://a.example"),
                http=HttpConfig(retries=0, allow=(f"127.0.0.1:{server.port}",)),
            )  # fmt: skip
            search = made("web", web, store, BudgetConfig(1.0), ledger=tmp_path / "payments.jsonl")
            texts = await search.tools["text_search"].run(TEXT)
            images = await search.tools["image_search"].run(IMAGE)
            assert search.counters()["tools/paid"] == pytest.approx(0.003)
            await search.close()
            return web, texts, images

    web, texts, images = asyncio.run(live())
    assert [t.link.rpartition("/")[2] for t in texts] == ["0", "2"]
    assert all("The capital of Nepal is Kathmandu" in t.text for t in texts)
    (image,) = images  # the other two thumbnails are no pictures
    assert image.title == "Nepal 0"
    assert Image.open(io.BytesIO(image.thumbnail)).size == (30, 20)
    for file in tmp_path.iterdir():
        assert file.is_dir() or KEY.encode() not in file.read_bytes()

    monkeypatch.delenv("SERPER_API_KEY")
    web = dataclasses.replace(web, upload=UploadConfig())

    async def again():
        search = made("web", web, dataclasses.replace(store, mode="replay"))
        assert await search.tools["text_search"].run(TEXT) == texts
        assert await search.tools["image_search"].run(IMAGE) == images
        with pytest.raises(ToolError, match="not_recorded"):
            await search.tools["text_search"].run(dataclasses.replace(TEXT, query="another"))
        await search.close()

    asyncio.run(again())


def test_pages_on_private_addresses_are_refused_unless_listed(tmp_path):
    async def main():
        async with FaultServer(engine) as server:
            web = WebConfig(
                text="searxng", image="retriever", searxng=SearxngConfig(server.url),
                retriever=RetrieverConfig(server.url), http=HttpConfig(retries=0),
            )  # fmt: skip
            search = made("web", web)
            with pytest.raises(ToolError, match="unread: none of 4 pages: refused"):
                await search.tools["text_search"].run(TEXT)
            (image,) = await search.tools["image_search"].run(IMAGE)  # brings its picture along
            assert Image.open(io.BytesIO(image.thumbnail)).size == (30, 20)
            await search.close()
            return server.heads

    heads = asyncio.run(main())
    assert not any(path(head).startswith("/page") for head in heads)


def test_limits_for_one_provider_leave_the_others_as_they_are():
    mine = {"serper": Limits(rate=3)}
    limits = WebConfig(http=HttpConfig(limits=mine)).http.limits
    assert limits == LIMITS | mine and limits["web"].rate == 500
    assert {"browser", LocalReader.provider, BrowserReader.provider} <= limits.keys()
    again = WebConfig(http=HttpConfig(limits=limits))
    assert again == WebConfig(http=HttpConfig(limits=mine))


@pytest.mark.parametrize(
    "make",
    [
        lambda url: WebConfig(reader=ReaderConfig(jina_url=url)), RetrieverConfig, SearxngConfig,
        SerperConfig, SerpApiConfig, JinaSearchConfig,
        lambda url: SummarizeConfig(base_url=url), lambda url: UploadConfig("folder", url),
    ],
)  # fmt: skip
def test_no_address_in_the_settings_can_hold_a_key(make):
    assert make("https://host.example/v1") is not None
    for url in (
        "https://me:s3cret@h.example",
        "https://h.example/?token=s3cret",
        "https://h#s3cret",
    ):
        with pytest.raises(ValueError, match="must hold no user or password") as raised:
            make(url)
        assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: WebConfig(reader=ReaderConfig(jina_key_env=name)),
        lambda name: SerperConfig(key_variable=name), lambda name: SerpApiConfig(key_variable=name),
        lambda name: JinaSearchConfig(key_variable=name),
        lambda name: SummarizeConfig(key_env=name),
    ],
)  # fmt: skip
def test_a_key_in_the_place_of_its_variable_is_not_shown(make):
    assert make("MY_KEY_2") is not None
    with pytest.raises(ValueError, match="give a variable's name") as raised:
        make("sk-s3cret")
    assert "s3cret" not in str(raised.value)


def test_only_what_is_wanted_needs_a_key(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    search = made("web", WebConfig(text="searxng"), only="text_search")
    assert list(search.tools) == ["text_search"]
    search = made("web", WebConfig(image="retriever"), only="image_search")
    assert list(search.tools) == ["image_search"]


@pytest.mark.parametrize("hangs", [True, False])
def test_one_part_that_does_not_close_keeps_no_other_open(hangs, tmp_path, monkeypatch):
    monkeypatch.setattr(toolbox_lib, "CLOSING", 0.2)

    class Broken:
        async def close(self):
            if hangs:
                await asyncio.Event().wait()  # a browser may take longer than there is time
            raise OSError("it is gone already")

    recorder = Recorder(Store(tmp_path / "s.db"))
    search = Search({}, recorder, reader=Broken())
    with Toolbox({}, closing=search.close):
        pass
    with pytest.raises(RuntimeError, match="after shutdown"):
        recorder._disk.submit(print)
    assert not (tmp_path / "s.db-wal").exists()  # the last one to leave takes it along
