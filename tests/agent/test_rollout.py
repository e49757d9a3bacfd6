"""The bookkeeping of many episodes: an engine that says what it is told, real tools that dawdle."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from mmsr_jax.agent.rollout import Ask, Rollouts, rollout
from mmsr_jax.engine.requests import SampledTurn, stream
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Author, Ending, ResultItem

IMAGE = "<reason>Look.</reason><search><img></search>"
TEXT = "<reason>Name.</reason><text_search>{}</text_search>"
ANSWER = "<reason>Found.</reason><answer>{}</answer>"
SEED = 7


class Actor:
    """Has the Engine's face; a trajectory speaks the lines that its stream names."""

    version = 1

    def __init__(self, tiny, flight, script, seed=0):
        self.flight = flight
        self.tokenizer, self.script = tiny.tokenizer, script
        self.rng = np.random.default_rng(seed)
        self.said, self.awake, self.budgets = {}, set(), []
        self.submitted, self.most, self.looks, self.next = [], 0, 0, 0

    @property
    def busy(self):
        return bool(self.awake)

    @property
    def live(self):
        return len(self.said)

    def submit(self, request):
        self.submitted.append(tuple(map(tuple, request.streams)))
        numbers = []
        for key in request.streams:
            self.said[self.next] = [tuple(key), 0]
            numbers.append(self.next)
            self.next += 1
        self.awake |= set(numbers)
        self.budgets.append(request.budget)
        self.most = max(self.most, len(self.said))
        return tuple(numbers)

    def step(self, temperature):
        self.looks += 1
        turns = []
        for number in sorted(self.awake):
            if self.rng.random() < 0.5:
                continue
            key, spoken = self.said[number]
            text = self.script[key][spoken]
            ids = np.asarray([*self.tokenizer.encode(text), self.tokenizer.im_end])
            turns.append(
                SampledTurn(number, ids, -np.ones(ids.size), np.ones(ids.size, np.int32), True)
            )
            self.said[number][1] += 1
            self.awake.discard(number)
        return turns

    def resume(self, resume):
        assert resume.number in self.said and resume.number not in self.awake
        assert resume.tokens.authors.tolist() == [Author.TOOL] * len(resume.tokens)
        self.awake.add(resume.number)
        self.budgets.append(resume.budget)

    def release(self, number):
        del self.said[number]
        self.awake.discard(number)


class Dawdle:
    """Echoes the query after a random while; some calls fail."""

    def __init__(self, name, seconds=0.003, seed=0):
        self.name, self.seconds = name, seconds
        self.rng = np.random.default_rng(seed)

    async def run(self, call):
        await asyncio.sleep(self.seconds * self.rng.random())
        if call.query == "fail":
            raise ToolError("failed", "on purpose")
        return (ResultItem(f"echo {call.query or 'picture'}"),)


def toolbox(**fields):
    tools = {name: Dawdle(name, **fields) for name in ("image_search", "text_search")}
    return Toolbox(tools, deadline=5.0)


def scripted(tiny, lines, visit=0):
    """Asks for `{name: [lines of sample 0, lines of sample 1, ...]}` and the script of an Actor."""
    asks, script = [], {}
    for name, samples in lines.items():
        asks.append(Ask(tiny.example(name), len(samples), visit=visit))
        for number, said in enumerate(samples):
            script[tuple(stream(SEED, name, visit, number))] = said
    return asks, script


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [3, 20])  # trajectories in flight
def test_every_sample_comes_back_in_its_place(tiny, rows, seed):
    rng = np.random.default_rng(seed)
    lines = {}
    for n in range(9):
        samples = []
        for s in range(int(rng.integers(1, 4))):
            answer = ANSWER.format(f"{n}.{s}")
            samples.append(
                [[answer], [IMAGE, answer], [IMAGE, TEXT.format(f"{n} {s}"), answer]][
                    rng.integers(3)
                ]
            )
        lines[f"e{n}"] = samples
    asks, script = scripted(tiny, lines)
    actor, ended = Actor(tiny, rows, script, seed), []
    with toolbox(seed=seed) as box:
        groups, timings = rollout(
            actor, box, asks, tiny.setting, seed=SEED, temperature=1.0, done=ended.append
        )
    assert sum(ended) == sum(map(len, lines.values()))
    for (name, samples), group in zip(lines.items(), groups, strict=True):
        assert [list(t.responses) for t in group] == samples
        assert [t.sample for t in group] == list(range(len(samples)))
        assert all(t.example.id == name and t.ending == Ending.ANSWERED for t in group)
        for t, said in zip(group, samples, strict=True):
            calls = [turn.call for turn in t.turns if turn.call]
            assert len(calls) == len(said) - 1
            for line, call in zip(said, calls, strict=False):  # each gets its own result
                assert call.query in line and (call.query or "img" in line)
            shown = [turn.text for turn in t.turns if turn.result]
            for call, text in zip(calls, shown, strict=True):
                assert f"echo {call.query or 'picture'}" in text
    assert not actor.live and actor.most <= rows
    assert set(timings) == {"rollout", "tools_wait"}
    assert 0 <= timings["tools_wait"] <= timings["rollout"]


def test_a_group_larger_than_the_flight_enters_an_empty_engine(tiny):
    lines = {"big": [[ANSWER.format(n)] for n in range(8)], "small": [[ANSWER.format("x")]]}
    asks, script = scripted(tiny, lines)
    actor = Actor(tiny, 3, script)
    with toolbox() as box:
        groups, _ = rollout(actor, box, asks, tiny.setting, seed=SEED, temperature=1.0)
    assert [t.responses[0] for t in groups[0]] == [ANSWER.format(n) for n in range(8)]
    assert [len(streams) for streams in actor.submitted] == [8, 1]


def test_groups_come_out_as_they_become_complete(tiny):
    """The first question's search hangs; the others do not wait for it."""
    late, early = [IMAGE, ANSWER.format(1)], [ANSWER.format(0)]
    asks, script = scripted(tiny, {"late": [late], "a": [early, early], "b": [early]})
    with toolbox(seconds=1.0, seed=1) as box:
        rollouts = Rollouts(Actor(tiny, 9, script), box, tiny.setting, seed=SEED, temperature=1.0)
        tickets = [rollouts.add(ask) for ask in asks]
        groups = rollouts.groups()
        first = [next(groups)[0], next(groups)[0]]
        assert sorted(first) == tickets[1:] and set(rollouts.unfinished) == {tickets[0]}
        # A question that is added later is played beside the one that hangs.
        more, lines = scripted(tiny, {"c": [early]})
        script |= lines
        ticket = rollouts.add(more[0])
        assert next(groups)[0] == ticket
        assert next(groups)[0] == tickets[0] and not rollouts.unfinished
        assert list(groups) == []


def test_streams_are_named_by_seed_example_visit_and_sample(tiny):
    asks, script = scripted(tiny, {"e": [[ANSWER.format(0)], [ANSWER.format(1)]]}, visit=5)
    actor = Actor(tiny, 4, script)
    with toolbox() as box:
        rollout(actor, box, asks, tiny.setting, seed=SEED, temperature=1.0)
    assert actor.submitted == [tuple(tuple(stream(SEED, "e", 5, s)) for s in range(2))]


def test_failed_tools_are_told_and_the_episode_goes_on(tiny):
    said = [TEXT.format("fail"), ANSWER.format("Lisbon")]
    asks, script = scripted(tiny, {"e": [said]})
    with toolbox() as box:
        ((played,),), _ = rollout(
            Actor(tiny, 2, script), box, asks, tiny.setting, seed=SEED, temperature=1.0
        )
    assert played.ending == Ending.ANSWERED
    assert played.turns[1].result.error == "failed: on purpose"
    assert "failed: on purpose" in played.turns[1].text


def test_an_episode_whose_results_do_not_fit_ends_and_gives_its_row_back(tiny):
    asks, script = scripted(tiny, {"e": [[IMAGE, ANSWER.format(1)]], "f": [[ANSWER.format(2)]]})
    prompt = len(tiny.prompt(tiny.picture(4, 6), "What capital?"))
    tight = dataclasses.replace(tiny.setting, max_tokens=prompt + 20)
    actor = Actor(tiny, 1, script)
    with toolbox() as box:
        groups, _ = rollout(actor, box, asks, tight, seed=SEED, temperature=1.0)
    assert [g[0].ending for g in groups] == [Ending.TOKEN_LIMIT, Ending.ANSWERED]
    assert all(len(g[0].tokens) <= tight.max_tokens for g in groups)
    assert not actor.live


def test_questions_that_cannot_be_asked_are_reported(tiny):
    asks, script = scripted(tiny, {"a": [[ANSWER.format(1)]], "b": [[ANSWER.format(2)]]})
    broken = Ask(tiny.example("broken", image=b"no picture"), 2)
    long = Ask(tiny.example("long", question="why? " * 99), 2)
    asks = [broken, asks[0], long, asks[1]]
    skipped = []
    with toolbox() as box:
        groups, _ = rollout(
            Actor(tiny, 2, script), box, asks, tiny.setting, seed=SEED, temperature=1.0,
            skipped=lambda ask, error: skipped.append((ask.example.id, str(error))),
        )  # fmt: skip
        assert [len(g) for g in groups] == [0, 1, 0, 1]
        assert [name for name, _ in skipped] == ["broken", "long"]
        assert "not a picture" in skipped[0][1] and "128 tokens" in skipped[1][1]
        with pytest.raises(ValueError, match="not a picture"):
            rollout(Actor(tiny, 2, {}), box, [broken], tiny.setting, seed=SEED, temperature=1.0)


def test_waiting_for_tools_costs_no_looks(tiny):
    """One more may fly, but the next group is of two: there is nothing to do but wait."""
    late = [IMAGE, ANSWER.format(1)]
    asks, script = scripted(tiny, {"a": [late, late, [ANSWER.format(0)]], "b": [late, late]})
    actor = Actor(tiny, 3, script)
    with toolbox(seconds=0.3, seed=1) as box:
        began = time.perf_counter()
        _, timings = rollout(actor, box, asks, tiny.setting, seed=SEED, temperature=1.0)
        took = time.perf_counter() - began
    assert actor.looks < 60, actor.looks
    assert timings["tools_wait"] > 0.5 * took


def test_what_is_abandoned_leaves_nothing_in_the_engine(tiny):
    """And what nobody can move any more is an error, not a loop without end."""
    late, early = [IMAGE, ANSWER.format(1)], [ANSWER.format(0)]
    asks, script = scripted(tiny, {"late": [late, late], "a": [early]})
    actor = Actor(tiny, 9, script)
    with toolbox(seconds=0.3) as box:
        rollouts = Rollouts(actor, box, tiny.setting, seed=SEED, temperature=1.0)
        tickets = [rollouts.add(ask) for ask in asks]
        assert next(rollouts.groups())[0] == tickets[1] and actor.live == 2
        rollouts.abandon()
        assert not actor.live and not rollouts.unfinished and list(rollouts.groups()) == []
        rollouts.add(asks[0])
        rollouts._look()
        actor.awake.clear()  # as if another's
        rollouts._calls.clear()
        with pytest.raises(RuntimeError, match="none of them can go on"):
            list(rollouts.groups())


def test_a_picture_that_the_engine_refuses_is_told_to_the_model(tiny):
    """A thumbnail may be larger than the engine was made for."""
    asks, script = scripted(tiny, {"e": [[IMAGE, ANSWER.format("Lisbon")]]})
    actor = Actor(tiny, 2, script)
    resume, seen = actor.resume, []

    def picky(given):
        if len(given.pictures) > 1:
            raise ValueError("a picture of 80 patches is larger than the 64")
        seen.append(given)
        resume(given)

    actor.resume = picky

    class Thumbnails:
        name = "image_search"

        async def run(self, call):
            return (ResultItem("Portugal", thumbnail=tiny.png(56, 28)),)

    with Toolbox({"image_search": Thumbnails()}, deadline=5.0) as box:
        ((played,),), _ = rollout(actor, box, asks, tiny.setting, seed=SEED, temperature=1.0)
    assert played.ending == Ending.ANSWERED and len(seen) == 1
    assert "larger than the 64" in played.turns[1].result.error


def test_nothing_asked_nothing_done(tiny):
    with toolbox() as box:
        groups, _ = rollout(Actor(tiny, 2, {}), box, [], tiny.setting, seed=SEED, temperature=0)
    assert groups == []
