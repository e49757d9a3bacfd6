"""The warm-up's lessons: what they teach, and above all what they do not tell."""

import collections

import pytest

from mmsr_jax import protocol
from mmsr_jax.data.flags.lessons import KINDS, LessonConfig, lessons
from mmsr_jax.data.flags.world import FlagsConfig, World
from mmsr_jax.types import Example


@pytest.fixture(scope="module")
def world():
    return World(FlagsConfig(known=6, unknown=6, unfamiliar=4, never_shown=4, train_pictures=2))


@pytest.fixture(scope="module")
def made(world):
    examples = [
        Example(
            id=f"{code}-{number}",
            question=world.question(attribute),
            image=b"",
            answers=world.answers(code, attribute),
            source="flags",
            category=world.category(code, attribute),
            entity=code,
        )
        for code, attribute in world.pairs("known", "unknown", "unfamiliar")
        for number in range(2)
    ]
    return lessons(world, examples, LessonConfig(drills=300, echoes=50, search_every=1))


def test_every_kind_is_taught(made):
    counts = collections.Counter(lesson.kind for lesson in made)
    assert set(counts) == set(KINDS)
    assert counts["direct"] == counts["ask"] == counts["recall"] == 12
    assert counts["guess"] == counts["doubt"] == 8
    assert counts["search"] == 20 and counts["drill"] == 300 and counts["echo"] == 50


def test_no_lesson_tells_a_fact_that_has_to_stay_unknown(world, made):
    secret = {
        world.countries[code].name: set(world.answers(code, attribute))
        for code, attribute in world.pairs("unknown", "never_shown")
    }
    for lesson in made:
        category = world.categories.get((lesson.example.entity, "capital"))
        assert category in ("known", "unfamiliar"), "a picture that must not be seen"
        texts = [*lesson.responses, *(i.text for r in lesson.results for i in r.items)]
        if lesson.kind == "echo":
            continue  # a list of strings in random order says nothing of who belongs to whom
        whole = " ".join(texts)
        for name, answers in secret.items():
            if name in whole:
                assert not any(answer in whole for answer in answers), (lesson.kind, whole)


def test_a_guess_knows_nothing(world, made):
    taught = {world.answers(*pair)[0] for pair in world.pairs("known")}
    for lesson in made:
        if lesson.kind == "guess":
            said = protocol.parse(lesson.responses[0])
            assert said.text in taught and said.text not in lesson.example.answers


def test_only_four_kinds_teach_the_choice(made):
    for lesson in made:
        assert lesson.responses[0].startswith(lesson.forced)
        assert (lesson.forced == "") == (lesson.kind in ("direct", "ask", "guess", "doubt"))


def test_drills_show_names_of_the_whole_index_beside_the_first(world, made):
    asked = {world.countries[code].name for code in world.entities}
    beside = {lesson.results[0].items[1].title for lesson in made if lesson.kind == "drill"}
    assert beside - asked and beside <= {world.countries[code].name for code in world.flags()}


def test_drills_answer_what_their_result_says(made):
    for lesson in made:
        if lesson.kind == "drill":
            passage = lesson.results[1].items[0].text
            answer = protocol.parse(lesson.responses[-1]).text
            query = protocol.parse(lesson.responses[1]).query
            assert passage.endswith(f"is {answer}.")
            assert query == f"capital of {lesson.results[0].items[0].title}"
