"""The world written out and indexed from files answers as the embedded one does."""

import pytest

from mmsr_jax.data.flags.corpus import write_corpus
from mmsr_jax.data.flags.search import image_index, text_index
from mmsr_jax.data.flags.world import World
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import open_index


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "of" / "flags"
    articles = sum(len(article.sentences) for article in world.articles())
    assert write_corpus(world, folder) == (articles, len(world.flags()))
    return folder


@pytest.fixture(scope="module")
def index(folder):
    out = folder.parent / "index"
    manifest, _ = build(folder, out, IndexConfig(thumbnail=56), HashEmbedder())
    assert manifest.skipped == {}
    with open_index(out) as index:
        yield index


def test_every_sentence_and_flag_is_in_the_index(world, index):
    assert len(index.text) == len(text_index(world))
    assert len(index.pictures) == len(image_index(world))


def test_texts_rank_as_in_the_embedded_world(world, index):
    embedded = text_index(world)
    for code in world.countries:
        query = world.query(code, "capital")
        assert index.text.search(query, 2) == embedded.search(query, 2)


def test_changed_pictures_find_their_flag(world, index):
    codes = list(world.entities)
    found = [
        index.pictures.search(world.picture(code, "capital", "measure", 0), 1)[0] for code in codes
    ]
    right = [entry.link == f"flags:{code}" for entry, code in zip(found, codes, strict=True)]
    assert sum(right) >= 0.99 * len(codes)
    names = {f"flags:{code}": country.name for code, country in world.countries.items()}
    assert all(names[entry.link] == entry.title for entry in found)


def test_where_the_facts_come_from_goes_along_but_is_no_document(folder, index):
    notice = (folder / "ATTRIBUTION").read_text(encoding="utf-8")
    assert "ODbL" in notice and "world-countries" in notice
    assert "Open Database License" in (folder / "LICENSE-facts-ODbL-1.0").read_text()
    assert index.text.search("Open Database License", 3) == []


def test_a_folder_with_something_in_it_is_left_alone(world, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="is there and not empty"):
            write_corpus(world, place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
