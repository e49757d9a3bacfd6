"""Text back ends of an index on disk: ranks, hostile queries, and the tools over them."""

import asyncio
import io
import subprocess
import sys
import threading

import pytest
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.index import text_fts
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import index_tools, open_index
from mmsr_jax.tools.index.text_fts import FtsIndex, FtsWriter
from mmsr_jax.tools.index.text_tantivy import TantivyIndex, TantivyWriter
from mmsr_jax.tools.local import Passage
from mmsr_jax.types import ToolCall

KINDS = {"fts": (FtsWriter, FtsIndex), "tantivy": (TantivyWriter, TantivyIndex)}
PASSAGES = [
    Passage("Nepal", "np", "The capital of Nepal is Kathmandu."),
    Passage("Nepal", "np", "The domain of Nepal is .np."),
    Passage("Niger", "ne", "The capital of Niger is Niamey."),
    Passage("Brasil", "br", "The capital of Brasil is Brasília."),
]
OPERATORS = [
    "", " \n\t", '"', '""""', "'; DROP TABLE passages; --", "capital AND", "NOT capital", "AND OR",
    "NEAR(capital, 3", "title:capital", "^capital*", "(((", "-", "+capital -Nepal", "{title}: x",
    "capital\x00of", "\ud800 capital", "🇳🇵🇳🇵", "___", "²³", "[a TO z]", "capital~2", "/capital/",
    "*:*", "\\", "link:np", "IN [a b]", "capital^1e999", "a" * 100_000, "capital " * 12_500,
    " ".join(str(i) for i in range(20_000)), "한국어 검색", "ﬁ",
]  # fmt: skip


def index_of(folder, kind, passages):
    writer, opened = KINDS[kind]
    made = writer(folder)
    made.add(passages)
    made.finish()
    return opened(folder)


@pytest.fixture(params=KINDS)
def index(request, tmp_path):
    made = index_of(tmp_path, request.param, PASSAGES)
    yield made
    made.close()


def test_one_result_an_article_best_first(index):
    assert len(index) == 4
    found = index.scored("capital of Nepal", 3)
    assert found[0][0] == PASSAGES[0]
    assert len({passage.link for passage, _ in found}) == len(found) == 3
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    assert index.search("Nepal domain", 1) == [PASSAGES[1]]
    assert index.search("zzz", 3) == []


def test_case_and_accents_do_not_matter(index):
    for query in ("BRASILIA", "brasília?", "Brası\u0301lia BRASI\u0301LIA"):
        assert index.search(query, 1) == [PASSAGES[3]]


@pytest.mark.parametrize("query", OPERATORS, ids=range(len(OPERATORS)))
def test_operators_are_only_words(index, query):
    assert len(index.search(query, 2)) <= 2
    assert index.search("Nepal", 1)[0].title == "Nepal"


def test_many_threads(index):
    wrong = []

    def work():
        for _ in range(30):
            if index.search("capital of Niger", 1) != [PASSAGES[2]]:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_an_article_of_very_many_passages_hides_no_other(tmp_path, kind):
    long = [Passage("Long", "long", f"river {number}") for number in range(300)]
    index = index_of(tmp_path, kind, [*long, Passage("Short", "short", "A river, among others.")])
    assert {passage.link for passage in index.search("river", 2)} == {"long", "short"}


def test_common_words_do_not_cost_rare_ones_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(text_fts, "COMMON", 5)
    passages = [
        Passage(f"T{n}", str(n), f"the {'old' if n % 2 else 'new'} thing w{n}") for n in range(200)
    ]
    few = index_of(tmp_path, "fts", passages)
    few._max_candidates = 120
    assert few._chosen(["the", "old", "w7", "w8"]) == ["w7", "w8", "old"]
    assert few._chosen(["the"]) == ["the"]  # alone it has to do
    whole = FtsIndex(tmp_path, max_candidates=None)
    assert whole._chosen(["the", "old"]) == ["the", "old"]
    for query in ("the old w7", "the new w8 w10"):
        assert few.search(query, 2) == whole.search(query, 2)


def picture(*colours):
    out = io.BytesIO()
    image = Image.new("RGB", (60, 40))
    for at, colour in enumerate(colours):
        image.paste(colour, (60 * at // len(colours), 0, 60, 40))
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tools_over_an_index_folder(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    (source / "nepal.txt").write_text("The capital of Nepal is Kathmandu.")
    for name, colours in (("IT", ("green", "white", "red")), ("FR", ("blue", "white", "red"))):
        (source / f"{name}.png").write_bytes(picture(*colours))
    build(source, tmp_path / "out", IndexConfig(text=kind), HashEmbedder())
    with open_index(tmp_path / "out") as index:
        tools = index_tools(index, image_results=1, text_results=2)

        def run(name, **fields):
            call = {"tool": name, "query": "", "image": b"", "question": ""} | fields
            return asyncio.run(tools[name].run(ToolCall(**call)))

        (item,) = run("text_search", query="capital NOT (Nepal")
        assert (item.title, item.link) == ("nepal", "nepal.txt") and "Kathmandu" in item.text
        with pytest.raises(ToolError, match="^no_results$"):
            run("text_search", query="zzz")
        (item,) = run("image_search", image=picture("navy", "white", "darkred"))
        assert item.title == "FR" and item.thumbnail[:2] == b"\xff\xd8"
        with pytest.raises(ToolError, match="^failed: the picture cannot be decoded"):
            run("image_search", image=b"no picture")


CLOSED_UNDER_A_SEARCH = """
import pathlib, sqlite3, sys, threading
from mmsr_jax.tools.index.text_fts import FtsIndex, FtsWriter
from mmsr_jax.tools.local import Passage

connect, made = sqlite3.connect, []
sqlite3.connect = lambda *a, **k: made.append(connect(*a, **k)) or made[-1]
folder = pathlib.Path(sys.argv[1])
writer = FtsWriter(folder)
writer.add(Passage("t", str(n), f"capital {n}") for n in range(2000))
writer.finish()
index = FtsIndex(folder)
searching, go_on = threading.Event(), threading.Event()

def search():
    def stop():
        searching.set()
        go_on.wait(20)
    index.search("nothing", 1)
    made[-1].set_progress_handler(stop, 100)
    try:
        index.search("capital", 3)
    except Exception:
        pass

threads = [threading.Thread(target=search)]
threads[0].start()
assert searching.wait(20)
threads.append(threading.Thread(target=index.close))
threads[1].start()
threads[1].join(0.2)  # where closing does not wait, it is done now
go_on.set()
for thread in threads:
    thread.join()
print("alive")
"""


def test_closing_waits_for_a_search_under_way(tmp_path):
    """Else the process ends by SIGSEGV: a search that came too late is still in its thread."""
    words = [sys.executable, "-c", CLOSED_UNDER_A_SEARCH, str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
