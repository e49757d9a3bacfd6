"""An index folder is there whole or not at all; a damaged one is one clear error."""

import fcntl
import io
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.index import manifest as manifests
from mmsr_jax.tools.index import vectors_exact, vectors_usearch
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import open_index


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "nepal.txt").write_text("The capital of Nepal is Kathmandu.")
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    return folder


def make(source, out, replace=False, **config):
    return build(source, out, IndexConfig(**config), HashEmbedder(), replace=replace)


def beside(out):
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


def test_broken_and_odd_pictures_are_left_out_and_counted(source, tmp_path):
    whole = (source / "red.png").read_bytes()
    (source / "torn.png").write_bytes(whole[:50])
    (source / "no.jpg").write_bytes(b"%!PS-Adobe-3.0")
    (source / "empty.gif").write_bytes(b"")
    Image.new("L", (1, 1000)).save(source / "strip.png")
    Image.new("RGB", (20, 20), "green").save(source / "good.webp")
    manifest, built = make(source, tmp_path / "out")
    assert built and manifest.skipped == {"broken picture": 4}
    assert manifest.pictures.pictures == 3 and manifest.text.passages == 1
    assert manifests.read(tmp_path / "out") == manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "pictures.sqlite", "text.sqlite", "vectors.f32"
    ]  # fmt: skip
    assert not beside(tmp_path / "out")


def test_progress_comes_to_its_end_and_not_too_often(tmp_path):
    source, told = tmp_path / "rows", []
    source.mkdir()
    (source / "rows.jsonl").write_text('{"text": "word"}\n' * 5000)
    build(
        source, tmp_path / "out", IndexConfig(), HashEmbedder(),
        progress=lambda *said: told.append(said),
    )  # fmt: skip
    reading = [done for stage, done, total in told if stage == "reading"]
    assert reading == sorted(reading) and reading[-1] == 5000 * 17 and 100 < len(reading) < 1100
    assert told[-1] == ("writing the text index", 1, 1)


def test_an_unchanged_source_is_not_built_again(source, tmp_path):
    out = tmp_path / "deep" / "out"
    first, _ = make(source, out)
    assert make(source, out) == (first, False)
    (source / "more.txt").write_text("More words.")
    with pytest.raises(ValueError, match=r"is an index of .*--replace it"):
        make(source, out)
    assert manifests.read(out) == first
    second, built = make(source, out, replace=True)
    assert built and second.text.passages == 2 and not beside(out)
    with pytest.raises(ValueError, match="--replace it"):
        make(source, out, words=7)


def test_what_is_no_index_is_never_replaced(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    for replace in (False, True):
        with pytest.raises(ValueError, match="is there and is no index"):
            make(source, tmp_path / "mine", replace=replace)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_a_build_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    first, _ = make(source, tmp_path / "out")
    (source / "more.txt").write_text("More words.")
    monkeypatch.setattr(manifests, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(source, tmp_path / "out", replace=True)
    assert manifests.read(tmp_path / "out") == first and not beside(tmp_path / "out")
    with open_index(tmp_path / "out") as index:
        assert index.text.search("Nepal", 1)[0].title == "nepal"


def test_what_a_killed_build_left_goes_with_the_next(source, tmp_path):
    left = tmp_path / ".out.building-killed"
    left.mkdir()
    (left / "building.lock").touch()
    (left / "text.sqlite").write_bytes(b"half")
    with open(left / "building.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other build does while it lives
        make(source, tmp_path / "out")
        assert left.exists()
    shutil.rmtree(tmp_path / "out")
    make(source, tmp_path / "out")
    assert not left.exists()


@pytest.mark.parametrize("opened", [True, False])
def test_killed_between_the_two_renames_the_old_index_comes_back(source, tmp_path, opened):
    """By opening it, and by the next build."""
    out = tmp_path / "out"
    first, _ = make(source, out)
    (source / "more.txt").write_text("More words.")
    code = (
        "import os, signal\n"
        "from mmsr_jax.tools.index import manifest\n"
        "rename, done = os.rename, []\n"
        "def once(*paths):\n"
        "    if done: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(rename(*paths))\n"
        "os.rename = once\n" + SLOW.replace("Slow()", "HashEmbedder(), replace=True")
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    assert child.returncode == -signal.SIGKILL and not out.exists()
    if opened:
        assert manifests.read(out) == first
        with open_index(out) as index:
            assert index.text.search("Nepal", 1)
    else:
        with pytest.raises(ValueError, match="--replace it"):
            make(source, out)
        assert manifests.read(out) == first
    make(source, out, replace=True)
    assert manifests.read(out).text.passages == 2 and not beside(out)


def test_an_old_index_goes_where_there_is_a_new_one(source, tmp_path):
    first, _ = make(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.old-killed")
    assert manifests.read(tmp_path / "out") == first and not beside(tmp_path / "out")


SLOW = """
import sys, time
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder

class Slow(HashEmbedder):
    def embed(self, images):
        print("embedding", flush=True)
        time.sleep(60)

build(sys.argv[1], sys.argv[2], IndexConfig(), Slow())
"""


def test_killed_in_the_middle_and_built_again(source, tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(out)],
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )  # fmt: skip
    assert child.stdout.readline() == "embedding\n"
    child.kill()
    child.communicate()
    assert not out.exists() and len(beside(out)) == 1
    make(source, out)
    assert not beside(out)
    with open_index(out) as index:
        assert len(index.pictures) == 2 and index.text.search("Nepal", 1)


def test_nothing_to_index_is_a_mistake(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/no.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="nothing to index.*'broken picture': 1"):
        make(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [{"text": "lucene"}, {"vectors": "magic"}, {"words": 0}])
def test_wrong_settings(field):
    with pytest.raises(ValueError, match="|".join(map(str, field.values()))):
        IndexConfig(**field)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "[" * 100_000, "is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99, this program reads"),
        (
            lambda text: text.replace('"passages": 1', '"passages": "many"'),
            "damaged .text.passages",
        ),
        (lambda text: text.replace('"passages": 1', '"passages": 5'), "1 passages.* says 5"),
        (lambda text: text.replace('"pictures": 2', '"pictures": 3'), "vectors.f32 has"),
        (lambda text: text.replace('"fts"', '"../../x"'), "has text by '../../x'"),
        (lambda text: text.replace('"exact"', '"magic"'), "has pictures by 'magic'"),
        (lambda text: text.replace("hash-1", "hash-0"), "built with hash .hash-0."),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(source, tmp_path, damage, said):
    make(source, tmp_path / "out")
    path = tmp_path / "out" / manifests.FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=said):
        open_index(tmp_path / "out")


@pytest.mark.parametrize("name", ["text.sqlite", "pictures.sqlite", "vectors.f32"])
def test_damaged_files_are_clear_errors(source, tmp_path, name):
    make(source, tmp_path / "out")
    file = tmp_path / "out" / name
    for ruin in (lambda: file.write_bytes(b"x" * 5000), file.unlink):
        ruin()
        with pytest.raises(ValueError, match=name):
            open_index(tmp_path / "out")


def test_the_graph_and_the_exact_index_agree(tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "many"
    source.mkdir()
    for number in range(60):
        blocks = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((48, 36)).save(source / f"{number}.png")
    make(source, tmp_path / "exact", vectors="exact")
    manifest, _ = make(source, tmp_path / "graph", vectors="usearch")
    assert manifest.pictures.back_end == "usearch"
    with open_index(tmp_path / "exact") as exact, open_index(tmp_path / "graph") as graph:
        for number in range(0, 60, 7):
            picture = (source / f"{number}.png").read_bytes()
            found = graph.pictures.scored(picture, 5)
            assert found == exact.pictures.scored(picture, 5)
            assert found[0][0].title == str(number) and found[0][1] == pytest.approx(1, abs=1e-5)
            assert Image.open(io.BytesIO(found[0][0].thumbnail)).size == (48, 36)
    (tmp_path / "graph/vectors.usearch").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="vectors.usearch"):
        open_index(tmp_path / "graph")


def test_rows_that_are_not_there_are_named(source, tmp_path):
    """A stranger's index: a graph with other keys, a table with other rows."""
    make(source, tmp_path / "graph", vectors="usearch")
    made = vectors_usearch._usearch().Index(ndim=HashEmbedder().size, metric="ip", dtype="f16")
    vectors = np.fromfile(tmp_path / "graph" / vectors_exact.FILE, np.float32).reshape(2, -1)
    made.add(np.array([7, 2**63 + 1], np.uint64), vectors)
    made.save(str(tmp_path / "graph" / vectors_usearch.FILE))
    picture = (source / "red.png").read_bytes()
    with (
        open_index(tmp_path / "graph") as index,
        pytest.raises(ToolError, match="damaged: its graph names vector 9223372036854775809 of 2"),
    ):
        index.pictures.scored(picture, 2)
    make(source, tmp_path / "exact", vectors="exact")
    with sqlite3.connect(tmp_path / "exact" / "pictures.sqlite") as table:
        table.execute("UPDATE entries SET row = row + 5")
    with (
        open_index(tmp_path / "exact") as index,
        pytest.raises(ToolError, match="damaged: it has no picture [01]"),
    ):
        index.pictures.scored(picture, 2)


def test_exact_ties_go_by_row(tmp_path):
    vectors = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    vectors.tofile(tmp_path / vectors_exact.FILE)
    index = vectors_exact.ExactVectors(tmp_path, 4, 2)
    rows, scores = index.nearest(np.array([1, 0], np.float32), 2)
    assert rows.tolist() == [0, 2] and scores.tolist() == [1, 1]
    assert index.nearest(np.array([0, 1], np.float32), 9)[0].tolist() == [1, 0, 2, 3]
    with pytest.raises(ValueError, match="has 32 bytes, 5 vectors of 2"):
        vectors_exact.ExactVectors(tmp_path, 5, 2)


def test_a_moved_index_still_opens(source, tmp_path):
    make(source, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "an other ?place#")
    with open_index(tmp_path / "an other ?place#") as index:
        assert index.text.search("Kathmandu", 1) and len(index.pictures) == 2
    assert json.loads((tmp_path / "an other ?place#/manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("file", "table"), [("text.sqlite", "common"), ("pictures.sqlite", "entries")]
)
def test_a_view_in_the_place_of_a_table_is_not_read(source, tmp_path, file, table):
    """A stranger's view may never come to its end, and sqlite does not hear Ctrl-C."""
    make(source, tmp_path / "out")
    db = sqlite3.connect(tmp_path / "out" / file)
    db.execute(f"ALTER TABLE {table} RENAME TO kept")
    db.execute(f"CREATE VIEW {table} AS SELECT * FROM kept")
    db.commit()
    db.close()
    with pytest.raises(ValueError, match=f"{file} is no .* index: it holds views or triggers"):
        open_index(tmp_path / "out")
