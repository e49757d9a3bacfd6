"""The local indices: ranking, hostile input, threads."""

import asyncio
import io
import threading

import numpy as np
import pytest
from PIL import Image

from mmsr_jax.tools import local
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.image_search import LocalImageSearch
from mmsr_jax.tools.local import LocalImageIndex, LocalTextIndex, Passage, PictureEntry
from mmsr_jax.tools.text_search import LocalTextSearch
from mmsr_jax.types import ToolCall

PASSAGES = [
    Passage("Nepal", "np", "The capital of Nepal is Kathmandu."),
    Passage("Nepal", "np", "The domain of Nepal is .np."),
    Passage("Niger", "ne", "The capital of Niger is Niamey."),
    Passage("Brasil", "br", "The capital of Brasil is Brasília."),
]

HOSTILE = [
    "",
    "   \n\t",
    '"',
    '""""',
    "'; DROP TABLE passages; --",
    "capital AND",
    "NOT capital",
    "NEAR(capital, 3",
    "title:capital",
    "^capital*",
    "(((",
    "-",
    "{title link}: x",
    "capital\x00of",
    "\ud800 capital",
    "🇳🇵🇳🇵",
    "___",
    "²³",
    "capital " * 12_500,
    "a" * 100_000,
    " ".join(str(i) for i in range(20_000)),
]


def picture(*colours, size=(60, 40)):
    """PNG of vertical stripes."""
    stripes = np.repeat(np.array([colours], np.uint8), size[0] // len(colours), axis=1)
    image = Image.fromarray(np.repeat(stripes, size[1], axis=0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED, WHITE, GREEN, BLUE = (200, 20, 30), (255, 255, 255), (0, 120, 60), (0, 40, 160)


def image_index():
    flags = {"IT": (GREEN, WHITE, RED), "FR": (BLUE, WHITE, RED), "mirror": (RED, WHITE, GREEN)}
    return LocalImageIndex(
        (picture(*stripes), PictureEntry(name, name, b"small " + name.encode()))
        for name, stripes in flags.items()
    )


def run(tool, **fields):
    call = {"tool": tool.name, "query": "", "image": b"", "question": ""} | fields
    return asyncio.run(tool.run(ToolCall(**call)))


def test_one_result_an_article_with_its_best_passage():
    index = LocalTextIndex(PASSAGES)
    found = index.search("capital of Nepal", 3)
    assert found[0] == PASSAGES[0]
    assert len({passage.link for passage in found}) == len(found) == 3
    assert index.search("Nepal domain", 1) == [PASSAGES[1]]


def test_case_and_accents_do_not_matter():
    index = LocalTextIndex(PASSAGES)
    assert index.search("BRASILIA", 1) == [PASSAGES[3]]
    assert index.search("brasília?", 1) == [PASSAGES[3]]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_queries_are_only_words(query):
    tool = LocalTextSearch(LocalTextIndex(PASSAGES), 2)
    try:
        items = run(tool, query=query)
    except ToolError as error:
        assert str(error) == "no_results"
    else:
        assert 1 <= len(items) <= 2 and all(item.text for item in items)
    assert run(tool, query="Nepal")[0].title == "Nepal"  # the table still stands


def test_search_words_are_no_operators():
    tool = LocalTextSearch(LocalTextIndex(PASSAGES), 3)
    assert run(tool, query='Niger NOT "capital"')[0].title == "Niger"


def test_text_index_serves_many_threads():
    index, wrong = LocalTextIndex(PASSAGES), []

    def work():
        for _ in range(50):
            if index.search("capital of Niger", 1) != [PASSAGES[2]]:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_image_search_ranks_and_returns_thumbnails():
    items = run(LocalImageSearch(image_index(), 2), image=picture(GREEN, WHITE, RED, size=(90, 70)))
    assert [item.title for item in items][0] == "IT" and len(items) == 2
    assert items[0].thumbnail == b"small IT" and items[0].link == "IT" and items[0].text == ""


def test_image_search_ignores_light_size_and_alpha():
    dark = tuple(tuple(int(v * 0.6) for v in colour) for colour in (BLUE, WHITE, RED))
    tool = LocalImageSearch(image_index(), 1)
    assert run(tool, image=picture(*dark))[0].title == "FR"
    clear = ((*BLUE, 255), (0, 0, 0, 0), (*RED, 255))  # transparent shows white
    assert run(tool, image=picture(*clear))[0].title == "FR"


@pytest.mark.parametrize("image", [b"", b"not a picture", picture(RED)[:60], b"%!PS-Adobe-3.0"])
def test_undecodable_pictures_fail_by_name(image):
    with pytest.raises(ToolError, match="^failed: the picture cannot be decoded"):
        run(LocalImageSearch(image_index(), 2), image=image)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_odd_and_plain_pictures_still_give_results(size):
    assert len(run(LocalImageSearch(image_index(), 2), image=picture(RED, size=size))) == 2


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1 picture, not 0"):
        LocalImageIndex([])
    for tool, index in ((LocalImageSearch, image_index()), (LocalTextSearch, None)):
        with pytest.raises(ValueError, match="topk must be at least 1, not 0"):
            tool(index, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_pictures_of_every_format_are_found(kind):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(GREEN, WHITE, RED))).save(buffer, kind)
    assert run(LocalImageSearch(image_index(), 1), image=buffer.getvalue())[0].title == "IT"


def test_what_is_searched_with_is_smaller_than_what_is_indexed(monkeypatch):
    index = image_index()
    monkeypatch.setattr(local, "QUERY_PIXELS", 2000)
    with pytest.raises(ToolError, match="60 x 40 pixels, at most 2000"):
        index.scored(picture(BLUE, WHITE, RED), 1)
    assert local.load(picture(BLUE, WHITE, RED)).size == (60, 40)


def test_a_jpeg_of_many_pixels_is_decoded_small(monkeypatch):
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(BLUE, WHITE, RED, size=(600, 400)))).save(out, "JPEG")
    assert local.load(out.getvalue(), 240_000).size == (600, 400)
    assert local.load(out.getvalue(), 20_000).size == (150, 100)
    with pytest.raises(ToolError, match="600 x 400 pixels, at most 100"):
        local.load(out.getvalue(), 100)
    monkeypatch.setattr(local, "MAX_PIXELS", 200_000)
    with pytest.raises(ToolError, match="600 x 400 pixels, at most 20000"):
        local.load(out.getvalue(), 20_000)
    monkeypatch.undo()
    whole = io.BytesIO()  # all of it stays in memory until its last scan is there
    Image.open(out).save(whole, "JPEG", progressive=True)
    assert local.load(whole.getvalue(), 240_000).size == (600, 400)
    with pytest.raises(ToolError, match="600 x 400 pixels, at most 20000"):
        local.load(whole.getvalue(), 20_000)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_loading_is_laying_on_white(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 9, 4), np.uint8), "RGBA").convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF" if mode == "CMYK" else "PNG")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    np.testing.assert_array_equal(np.asarray(local.load(out.getvalue())), canvas.convert("RGB"))
