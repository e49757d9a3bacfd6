"""The search engine of the world finds what it should, for every country."""

import pytest

from mmsr_jax.data.flags.attributes import ATTRIBUTES
from mmsr_jax.data.flags.search import flags_tools, image_index, text_index
from mmsr_jax.data.flags.world import World
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ToolCall


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_text_search_puts_the_right_sentence_first(world, attribute):
    index = text_index(world)
    # The capital for every country; of the rarer facts, for the sake of time, a sample. (All hold.)
    for code in list(world.countries)[:: 1 if attribute == "capital" else 5]:
        if world.answers(code, attribute):
            best = index.search(world.query(code, attribute), 3)[0]
            assert best.text == world.sentence(code, attribute)


def test_whole_questions_find_the_capital_too(world):
    index = text_index(world)
    for code in world.entities:
        query = f"What is the capital of {world.countries[code].name}?"
        assert index.search(query, 1)[0].text == world.sentence(code, "capital")


def test_image_search_puts_the_right_flag_first(world):
    index, right, asked = image_index(world), {}, {}
    for code in world.flags():
        for number in range(3):
            best = index.search(world.picture(code, "capital", "measure", number), 1)[0]
            right[code] = right.get(code, 0) + (best.link == f"flags:{code}")
            asked[code] = asked.get(code, 0) + 1
    assert sum(right.values()) >= 0.99 * sum(asked.values())
    entities = world.entities
    assert sum(right[code] for code in entities) >= 0.99 * sum(asked[code] for code in entities)


def test_tools_answer_through_the_toolbox(world):
    picture = world.picture("NP", "capital", "test", 0)
    with Toolbox(flags_tools(world, image_results=2, text_results=2)) as box:
        images = box.submit(ToolCall("image_search", "", picture, "?")).result(10)
        texts = box.submit(ToolCall("text_search", "capital of Nepal", picture, "?")).result(10)
        broken = box.submit(ToolCall("image_search", "", b"?", "?")).result(10)
        nothing = box.submit(ToolCall("text_search", "zzzz", picture, "?")).result(10)
    assert [len(r.items) for r in (images, texts, broken, nothing)] == [2, 2, 0, 0]
    assert images.items[0].title == "Nepal"
    assert images.items[0].thumbnail == world.thumbnail("NP")
    assert texts.items[0].text == "The capital of Nepal is Kathmandu."
    assert texts.items[0].link == "flags:NP"
    assert broken.error.startswith("failed: the picture cannot be decoded")
    assert nothing.error == "no_results"
