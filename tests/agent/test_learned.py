"""From lessons to a policy that uses its tools: demonstrate, train, roll out, compare.

A model small enough to learn three conversations by heart in seconds must then speak them through
the real engine, word for word, with real tool calls, and the trainer must agree on every log-prob.
"""

import asyncio
import dataclasses

import numpy as np
import pytest

from mmsr_jax.agent.demonstrate import demonstrate
from mmsr_jax.agent.rollout import Ask, rollout
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.train.update import Fixed, sft_update
from mmsr_jax.types import Author, Ending, Lesson, ResultItem, ToolResult

IMAGE = "<reason>Look.</reason><search><img></search>"
TEXT = "<reason>Name.</reason><text_search>capital of Portugal</text_search>"
ANSWER = "<reason>Found.</reason><answer>{}</answer>"


class Pages:
    """Ranked pages, after a while."""

    def __init__(self, tiny, name, rng=None):
        self.tiny, self.name, self.rng = tiny, name, rng

    async def run(self, call):
        if self.rng is not None:
            await asyncio.sleep(0.02 * self.rng.random())
        if self.name == "image_search":
            return tuple(
                ResultItem(title, thumbnail=self.tiny.png(56, 28, seed))
                for seed, title in enumerate(("Portugal", "Paris"))
            )
        return (ResultItem("Portugal", text="Lisbon is the capital."),)


def toolbox(tiny, seed=None):
    rng = None if seed is None else np.random.default_rng(seed)
    return Toolbox({n: Pages(tiny, n, rng) for n in ("image_search", "text_search")}, deadline=9)


@pytest.fixture(scope="module")
def lessons(tiny):
    pictures = [tiny.png(140, 84, 1), tiny.png(84, 56, 2), tiny.png(56, 28, 3)]
    scripts = [(IMAGE, TEXT, ANSWER.format("Lisbon")), (ANSWER.format("Paris"),),
               (TEXT, ANSWER.format("Porto"))]  # fmt: skip
    return [
        Lesson(tiny.example(f"lesson {n}", image=picture), script)
        for n, (picture, script) in enumerate(zip(pictures, scripts, strict=True))
    ]


@pytest.fixture(scope="module")
def taught(tiny, lessons):
    """What was demonstrated, and weights that know it by heart."""
    with toolbox(tiny) as box:
        played = [demonstrate(lesson, tiny.setting, box) for lesson in lessons]
    fixed = Fixed(tiny.graph, tiny.model, tiny.pack, tiny.transform)
    state = state_lib.create(tiny.params(), tiny.transform)
    for _ in range(120):
        state, values, micro = sft_update(fixed, state, [Piece(t) for t in played])
        assert micro == 1 and not values["skipped"]
        if values["token_loss"] < 0.02:
            break
    assert values["token_loss"] < 0.02
    return played, state.params


def ask(tiny, engine, asks, temperature, seed=0):
    with toolbox(tiny, seed) as box:
        return rollout(engine, box, asks, tiny.setting, seed=11, temperature=temperature)[0]


def test_the_policy_repeats_its_lessons_word_for_word(tiny, lessons, taught):
    played, params = taught
    engine = tiny.engine(params, tiny.tokenizer.eos_ids)
    groups = ask(tiny, engine, [Ask(lesson.example, 1) for lesson in lessons], 0.0)
    for lesson, expected, (found,) in zip(lessons, played, groups, strict=True):
        assert found.responses == lesson.responses and found.ending == Ending.ANSWERED
        for name in ("ids", "authors", "positions", "image_index"):
            left, right = getattr(found.tokens, name), getattr(expected, name)
            np.testing.assert_array_equal(left, right, err_msg=name)
        digests = [[p.digest for p in t.pictures] for t in (found.tokens, expected)]
        assert digests[0] == digests[1]
    assert [len(t.pictures) for t in played] == [3, 1, 1]


def test_log_probs_of_whole_episodes_equal_the_trainers(tiny, lessons, taught):
    """Issue 2: at most 1e-4 a token, with an image search and a text search."""
    _, params = taught
    engine = tiny.engine(params, tiny.tokenizer.eos_ids)
    groups = ask(tiny, engine, [Ask(lesson.example, 4) for lesson in lessons], 1.0)
    both = [t for t in groups[0] if {turn.call.tool for turn in t.turns if turn.call}
            == {"image_search", "text_search"}]  # fmt: skip
    assert len(both) >= 2
    pieces = [Piece(t.tokens) for group in groups for t in group]
    worst = 0.0
    for batch in assemble(pieces, tiny.model, tiny.pack, aggregate="token"):
        trained = step.logprobs(tiny.graph, params, batch, np.float32(1))
        worst = max(worst, float((np.abs(trained - batch.sampler_logprobs) * batch.mask).max()))
    assert worst < 1e-5, worst


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_samples_depend_neither_on_neighbours_nor_on_when_tools_answer(
    tiny, lessons, taught, temperature
):
    _, params = taught
    asks = [Ask(lesson.example, 3, visit=2) for lesson in lessons]
    engine = tiny.engine(params, tiny.tokenizer.eos_ids)
    base = ask(tiny, engine, asks, temperature)
    again = ask(tiny, engine, asks[::-1], temperature, seed=1)[::-1]
    alone = [ask(tiny, engine, [a], temperature, seed=2)[0] for a in asks]
    for other in (again, alone):
        for left, right in zip(base, other, strict=True):
            for a, b in zip(left, right, strict=True):
                np.testing.assert_array_equal(a.tokens.ids, b.tokens.ids)
                np.testing.assert_array_equal(a.tokens.logprobs, b.tokens.logprobs)
                assert a.responses == b.responses and a.ending == b.ending


def test_a_forced_beginning_is_played_and_not_learned(tiny, lessons, taught):
    """Constant policies: the direct answerer is made to search."""
    _, params = taught
    engine = tiny.engine(params, tiny.tokenizer.eos_ids)
    forced = "<reason>Look.</reason><search><img>"
    asks = [Ask(lessons[1].example, 1, forced=forced)]
    ((played,),) = ask(tiny, engine, asks, 0.0)
    assert played.responses[0].startswith(forced)
    given = int(np.flatnonzero(played.tokens.authors == Author.MODEL)[0])
    assert tiny.tokenizer.decode(played.tokens.ids[:given]).endswith(forced)


def test_a_lesson_needs_its_tools_its_room_and_its_beginning(tiny, lessons):
    with toolbox(tiny) as box:
        with pytest.raises(ValueError, match="lesson 1 ends early: answered"):
            script = lessons[1].responses * 2
            demonstrate(dataclasses.replace(lessons[1], responses=script), tiny.setting, box)
        with pytest.raises(ValueError, match="does not start with"):
            demonstrate(dataclasses.replace(lessons[1], forced="Well"), tiny.setting, box)
        with pytest.raises(ValueError, match="does not fit in 60 tokens"):
            tight = dataclasses.replace(tiny.setting, max_tokens=60)
            demonstrate(lessons[0], tight, box)
        with pytest.raises(ValueError, match="a response of 20 tokens, room for 16"):
            long = dataclasses.replace(lessons[1], responses=(ANSWER.format("Lisbon " * 9),))
            demonstrate(long, tiny.setting, box)
    with pytest.raises(ValueError, match="calls image_search, no tools are given"):
        demonstrate(lessons[0], tiny.setting, None)


def test_a_lesson_may_stop_at_a_call(tiny, lessons):
    """Only the call is learned then: no tool is asked."""
    short = dataclasses.replace(lessons[0], responses=(IMAGE,))
    played = demonstrate(short, tiny.setting, None)
    own = played.authors == Author.MODEL
    assert tiny.tokenizer.decode(played.ids[own]) == f"{IMAGE}<|im_end|>"
    assert not (played.authors == Author.TOOL).any()


def test_given_results_stand_in_for_tools_and_forced_words_are_not_learned(tiny, lessons):
    given = (ToolResult("text_search", (ResultItem("Porto", text="Porto it is."),), 0.0),)
    lesson = dataclasses.replace(lessons[2], results=given, forced=TEXT)
    played = demonstrate(lesson, tiny.setting, None)
    own = played.ids[played.authors == Author.MODEL]
    assert tiny.tokenizer.decode(own) == f"<|im_end|>{ANSWER.format('Porto')}<|im_end|>"
    assert "Porto it is." in tiny.tokenizer.decode(played.ids[played.authors == Author.TOOL])


class Faulty(Pages):
    """Answers the question of one picture badly, all others well."""

    def __init__(self, tiny, name, victim, fault):
        super().__init__(tiny, name)
        self.victim, self.fault = victim, fault

    async def run(self, call):
        if call.image != self.victim:
            return await super().run(call)
        if self.fault == "hang":
            await asyncio.sleep(60)
        if self.fault == "raise":
            raise RuntimeError("the roof is on fire")
        if self.fault == "pictures":
            return tuple(
                ResultItem(f"page {n}", thumbnail=self.tiny.png(140, 84, n)) for n in range(50)
            )
        return (ResultItem("Portugal", text="Lisbon is the capital. " * 45_000),)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("hang", "timeout"), ("raise", "roof is on fire"), ("pictures", None), ("megabyte", None)],
)
def test_a_faulty_tool_is_the_trouble_of_its_own_episode(tiny, lessons, taught, fault, error):
    _, params = taught
    engine = tiny.engine(params, tiny.tokenizer.eos_ids)
    pages = engine.free_pages
    asks = [Ask(lesson.example, 2) for lesson in lessons]
    good = ask(tiny, engine, asks, 1.0)
    tools = {
        name: Faulty(tiny, name, lessons[0].example.image, fault)
        for name in ("image_search", "text_search")
    }
    with Toolbox(tools, deadline=0.5) as box:
        groups, _ = rollout(engine, box, asks, tiny.setting, seed=11, temperature=1.0)
    assert engine.free_pages == pages and not engine.live
    for left, right in zip(groups[1:], good[1:], strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a.tokens.ids, b.tokens.ids)
            np.testing.assert_array_equal(a.tokens.logprobs, b.tokens.logprobs)
    for trajectory in groups[0]:
        first = next(turn for turn in trajectory.turns if turn.result)
        assert len(trajectory.tokens) <= tiny.setting.max_tokens
        # Every picture that is shown is shown whole.
        rows = trajectory.tokens.image_index[trajectory.tokens.image_index >= 0]
        whole = sum(p.patches.shape[0] // 4 for p in trajectory.tokens.pictures)
        assert rows.tolist() == list(range(whole))
        if error:
            assert error in first.result.error and error in first.text
            assert len(trajectory.responses) > 1  # it went on
        else:
            assert len(first.result.items) < 50 and len(first.text) < 2000
