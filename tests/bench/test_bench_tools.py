"""The measurement of local search: its sources, its clock, and the whole of it at a small size."""

import json

import pytest
from pyarrow import parquet

from mmsr_jax.bench import tools, tools_data, tools_load
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.pictures import decoded


def test_the_sources_are_what_they_say(tmp_path):
    tools_data.write_passages(tmp_path / "p.parquet", 130, block=50)
    rows = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["id"] for row in rows] == [str(number) for number in range(130)]
    assert rows[4]["title"] == rows[7]["title"] != rows[8]["title"]
    assert all(len(row["text"].split()) == tools_data.WORDS for row in rows)
    asked = json.loads((tmp_path / "questions.json").read_text())
    texts = {}
    for row in rows:
        texts.setdefault(row["link"], []).append(f"{row['title']} {row['text']}".rstrip("."))
    for question, link in zip(asked["entity"], asked["entity_links"], strict=True):
        assert any(set(question.split()) <= set(text.split()) for text in texts[link])
    assert len(asked["entity"]) == 130 and len(asked["words"]) == 500


def test_a_picture_seen_again_is_nearest_to_itself():
    embedder = HashEmbedder()
    there = embedder.embed([decoded(tools_data.picture(number)) for number in range(20)])
    again = embedder.embed(
        [decoded(tools_data.picture(number, seen_again=True)) for number in range(20)]
    )
    assert (again @ there.T).argmax(1).tolist() == list(range(20))


def test_the_load_asks_everything_and_counts():
    asked = []

    def connect():
        return asked.append

    figures = tools_load.load(connect, list(range(7)), concurrency=3, seconds=0.05)
    assert figures["answers"] == len(asked) - 7  # all seven before the clock ran
    assert set(asked) == set(range(7))
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]

    def broken(question):
        if len(asked) > 0 and question == 3:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        tools_load.load(lambda: broken, [3], 1, 0.05)


def test_mistakes():
    with pytest.raises(ValueError, match="at least 1"):
        tools.Options(passages=0)
    with pytest.raises(ValueError, match="no back end 'lucene'"):
        tools.Options(text=("lucene",))


@pytest.mark.slow
def test_the_whole_at_a_small_size(tmp_path):
    options = tools.Options(
        passages=400, pictures=60, seconds=0.1, compared=5, concurrency=(1, 4), folder=str(tmp_path)
    )
    record = tools.run(options)
    assert not list(tmp_path.iterdir())
    for name in ("fts", "tantivy"):
        part = record["text"][name]
        assert part["quality"]["own_article_found"] == 1
        assert part["build"]["bytes"] > 10_000 and part["http"]["words"]["4"]["answers"] > 0
    assert (
        record["text"]["fts"]["quality"]["recall_words"] == 1
    )  # few passages: nothing is left out
    for name in ("exact", "usearch"):
        assert record["pictures"][name]["quality"] == {"recall": 1, "right_first": 1}
    shown = tools.table(json.loads(json.dumps(record)))
    assert "400 passages, tantivy" in shown and "60 pictures" in shown
