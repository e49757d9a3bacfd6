"""`tools.backend` "index": tools straight over an index folder, no server in between."""

import io
import shutil

import pytest
from PIL import Image

from mmsr_jax.embed.folder import open_folder
from mmsr_jax.tools.assembly import WebConfig, assemble
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import FolderConfig
from mmsr_jax.tools.store import StoreConfig
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ToolCall

TEXT = ToolCall("text_search", "capital of Nepal", b"", "?")


def picture(colour):
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return out.getvalue()


def image(colour):
    return ToolCall("image_search", "", picture(colour), "?")


def made(tmp_path, name, documents=True, pictures=True):
    """An index folder over two documents and two pictures, or over one kind alone."""
    source = tmp_path / f"{name}-source"
    source.mkdir()
    if documents:
        (source / "nepal.txt").write_text("The capital of Nepal is Kathmandu.")
        (source / "niger.txt").write_text("The capital of Niger is Niamey.")
    if pictures:
        (source / "red.png").write_bytes(picture("red"))
        (source / "half.png").write_bytes(picture("white"))
    build(source, tmp_path / name, IndexConfig(), HashEmbedder())
    return tmp_path / name


def search(folder, store=None, only=""):
    return assemble(
        "index", WebConfig(), store or StoreConfig(), BudgetConfig(), image_results=1,
        text_results=1, deadline=30.0, local=dict, local_identity={}, only=only,
        index=lambda: open_folder(FolderConfig(str(folder))),
    )  # fmt: skip


def ask(search, *calls):
    with Toolbox(search.tools, closing=search.close) as box:
        return [box.submit(call).result(30) for call in calls]


def test_both_tools_answer_from_the_folder(tmp_path):
    found = search(made(tmp_path, "out"))
    assert found.counters() == {}
    text, shown, broken = ask(found, TEXT, image("red"), ToolCall("image_search", "", b"?", "?"))
    assert [i.text for i in text.items] == ["The capital of Nepal is Kathmandu."]
    assert len(shown.items) == 1 and Image.open(io.BytesIO(shown.items[0].thumbnail)).width == 40
    assert broken.error.startswith("failed: the picture cannot be decoded")
    with pytest.raises(Exception, match="closed"):  # the toolbox has closed the index
        found.tools["image_search"]._index.search(picture("red"), 1)


def test_recorded_and_replayed_from_another_place_but_not_from_another_index(tmp_path):
    store = str(tmp_path / "calls.db")
    folder = made(tmp_path, "out")
    live = ask(search(folder, StoreConfig(store)), TEXT, image("red"))
    moved = shutil.move(folder, tmp_path / "moved")
    again = search(moved, StoreConfig(store, "replay"))
    replayed = ask(again, TEXT, image("red"), image("blue"))
    assert [r.items for r in replayed[:2]] == [r.items for r in live]
    assert all(r.items for r in live) and replayed[2].error.startswith("not_recorded")
    assert again.counters()["tools/missed"] == 1 and again.counters()["tools/live"] == 0
    other = search(made(tmp_path, "other"), StoreConfig(store, "replay"))
    assert ask(other, TEXT)[0].error.startswith("not_recorded")


def test_no_folder_or_no_index_in_it_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tools\.index\.folder, which names none.*mmsr search in"):
        search("")
    with pytest.raises(ValueError, match=r"nowhere is no index: it has no manifest\.json"):
        search(tmp_path / "nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(ValueError, match=r"foreign.manifest\.json is damaged.*index again"):
        search(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("there", "lacks", "tool", "other"),
    [("documents", "pictures", "image_search", "text_search"),
     ("pictures", "documents", "text_search", "image_search")],
)  # fmt: skip
def test_an_index_of_one_kind_has_one_tool(tmp_path, there, lacks, tool, other):
    folder = made(tmp_path, "out", **{lacks: False})
    for only in ("", tool):
        with pytest.raises(ValueError, match=f"index .*out has no {lacks}, so there is no {tool}"):
            search(folder, only=only)
    one = search(folder, only=other)
    assert list(one.tools) == [other]
    assert ask(one, TEXT if other == "text_search" else image("red"))[0].error is None
