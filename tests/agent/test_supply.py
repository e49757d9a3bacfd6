"""Which groups a step gets when slow searches may be left behind."""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.agent.rollout import Ask
from mmsr_jax.agent.supply import CarryConfig, Drawn, Supply
from mmsr_jax.inputs import chat
from mmsr_jax.types import Ending, Trajectory

NEVER = 10**9


class Field:
    """Rollouts' face: each question is complete at a given update and round, of a given age."""

    def __init__(self, tiny, ends):
        """`ends`: by ticket, the update at which it ends (None: it cannot be asked)."""
        self.tiny, self.ends = tiny, ends
        self.engine = dataclasses.make_dataclass("E", [("version", int)])(0)
        self.unfinished, self.asked, self.waited = {}, [], []

    def add(self, ask):
        ticket = len(self.asked)
        self.asked.append(ask)
        self.unfinished[ticket] = self.engine.version
        return ticket

    def groups(self):
        """First what ends by itself at this update, then, if the caller insists, the late ones."""
        while self.unfinished:
            now = self.engine.version
            order = sorted(
                self.unfinished, key=lambda t: (max((self.ends.get(t) or 0) - now, 0), t)
            )
            ticket = order[0]
            end = self.ends.get(ticket, 0)
            if end is not None and end > now:
                self.waited.append((now, ticket))
            began = self.unfinished.pop(ticket)
            yield ticket, [] if end is None else [self.trajectory(ticket, began)]

    def trajectory(self, ticket, version):
        prompt = self.tiny.prompt("What?")
        said = chat.model_turn([1, 2], [-1.0, -1.0], prompt.next_position, version)
        tokens = chat.join(prompt, said)
        example = self.asked[ticket].example
        return Trajectory(example, 0, tokens, (), ("",), Ending.ANSWERED)


def supply(tiny, field, prompts, **config):
    count = iter(range(1000))

    def draw():
        n = next(count)
        return Drawn(Ask(tiny.example(str(n)), 1), {"next_index": n})

    return Supply(field, CarryConfig(**config), prompts, draw)


def ids(groups):
    return [int(g[0].example.id) for g in groups]


def test_without_carry_over_a_step_waits_for_all_of_its_own(tiny):
    field = Field(tiny, {1: NEVER, 4: None})
    source = supply(tiny, field, 3)
    assert ids(source.take(9)) == [0, 1, 2] and source.in_flight == []
    field.engine.version += 1
    assert ids(source.take(9)) == [3, 5, 6]  # question 4 could not be asked: 6 took its place
    assert source.in_flight == [] and source.drawn == 7


def test_slow_groups_are_left_behind_until_they_may_not_grow_older(tiny):
    field = Field(tiny, {1: NEVER, 2: 1})
    source = supply(tiny, field, 2, questions=2, staleness=2)
    assert ids(source.take(9)) == [0, 3] and not field.waited
    assert [d.origin["next_index"] for d in source.in_flight] == [1, 2]
    field.engine.version += 1
    assert ids(source.take(9)) == [2, 4] and not field.waited  # 2 has ended by now
    field.engine.version += 1
    # Question 1 began at update 0: at the next one it would be three updates old.
    assert 1 in ids(source.take(9))
    assert field.waited == [(2, 1)]


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_doubled_or_too_old(tiny, seed):
    rng = np.random.default_rng(seed)
    prompts, staleness = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    questions = int(rng.integers(1, staleness * prompts + 1))
    late = {t: int(t / prompts + rng.geometric(0.4)) for t in range(200) if rng.random() < 0.4}
    late |= {t: None for t in range(200) if rng.random() < 0.1}
    field = Field(tiny, late)
    source = supply(tiny, field, prompts, questions=questions, staleness=staleness)
    seen = []
    for now in range(30):
        field.engine.version = now
        groups = source.take(9)
        assert len(groups) >= prompts
        for group in groups:
            assert now - group[0].tokens.versions.max() <= staleness
        seen += ids(groups)
    flying = [int(d.ask.example.id) for d in source.in_flight]
    broken = [t for t, end in late.items() if end is None and t < source.drawn]
    assert sorted(seen + flying + broken) == list(range(source.drawn))
    assert len(flying) <= questions


def test_the_last_steps_ask_nothing_that_nobody_would_learn_from(tiny):
    field = Field(tiny, {1: NEVER, 5: NEVER})
    source = supply(tiny, field, 2, questions=2, staleness=2)
    for now, left in enumerate((3, 2, 1)):
        field.engine.version = now
        source.take(left)
    assert source.drawn == 6 and source.in_flight == []


def test_what_cannot_be_meant_is_refused():
    CarryConfig().check(4, 0.0)
    CarryConfig(questions=8, staleness=2).check(4, 2.0)
    with pytest.raises(ValueError, match="sampler_correction"):
        CarryConfig(questions=2).check(4, 0.0)
    with pytest.raises(ValueError, match="carry.questions is 9, .* are no more than 8"):
        CarryConfig(questions=9, staleness=2).check(4, 2.0)
    with pytest.raises(ValueError, match="at least 0 and 1"):
        CarryConfig(questions=1, staleness=0).check(4, 2.0)
