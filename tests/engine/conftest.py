"""Conversations played through an engine directly: no parsing, no tools, only their words."""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.engine.engine import Request, Resume, stream
from mmsr_jax.inputs import chat


@dataclasses.dataclass(frozen=True)
class Plan:
    """What everyone but the model says, and how long the model may speak."""

    first: tuple  # parts of the prompt
    tools: tuple = ()  # parts of each tool message
    budgets: tuple = (7,)  # of each turn of the model
    key: tuple = (0,)  # names the random stream


@pytest.fixture(scope="session")
def plans(tiny) -> list[Plan]:
    """Rows of unequal length: pictures in the prompt, in results, several, equal ones, none."""
    flag, small, thumb = tiny.picture(6, 10), tiny.picture(4, 6), tiny.picture(2, 4)
    other = tiny.picture(2, 4, seed=1)
    found = ("<information>1. ", thumb, " Lisbon\n2. ", other, " Porto\n</information>")
    text = ("<information>1. Portugal: Lisbon is the capital.\n</information>",)
    return [
        Plan((flag, "What capital?"), (found, text), (7, 12, 5), ("a",)),
        Plan(("What capital of Portugal is this, and why is it Porto?",), (text,), (3, 9), ("b",)),
        Plan((small, "What?"), (("Look. ", flag, thumb), text), (12, 1, 6), ("c",)),
        Plan((thumb, thumb, "Paris or ", small), (), (11,), ("d",)),
        Plan((flag, "What capital?"), (text, found), (2, 4, 12), ("e",)),
    ]


@pytest.fixture(scope="session")
def play(tiny):
    """play(engine, plans) -> Tokens of each whole conversation; rows are given back."""

    def run(engine, plans, temperature=1.0, arrival=None):
        """`arrival`: a numpy generator that makes tools answer late and in any order."""
        requests = [Request(tiny.prompt(*p.first), (stream(*p.key),), p.budgets[0]) for p in plans]
        rows = [row for (row,) in engine.admit(requests)]
        said = {row: (request.prompt, 0) for row, request in zip(rows, requests, strict=True)}
        paused = []
        while engine.running or paused:
            for turn in engine.decode(temperature):
                tokens, spoken = said[turn.row]
                piece = chat.model_turn(turn.ids, turn.logprobs, tokens.next_position)
                said[turn.row] = (chat.join(tokens, piece), spoken + 1)
                if spoken < len(plans[rows.index(turn.row)].tools):
                    paused.append(turn.row)
            woken = [row for row in paused if arrival is None or arrival.random() < 0.4]
            if arrival is not None:
                arrival.shuffle(woken)
            resumes = []
            for row in woken:
                paused.remove(row)
                tokens, spoken = said[row]
                plan = plans[rows.index(row)]
                piece = tiny.tool(tokens, *plan.tools[spoken - 1])
                said[row] = (chat.join(tokens, piece), spoken)
                pictures = said[row][0].pictures
                resumes.append(Resume(row, piece, pictures, plan.budgets[spoken]))
            if resumes:
                engine.extend(resumes)
        for row in rows:
            assert engine.length(row) == len(said[row][0])
            engine.release(row)
        return [said[row][0] for row in rows]

    return run


# A row's numbers do not depend on its neighbours: equal to the bit.
ROUNDING = 0.0


def assert_same(left, right, tolerance=ROUNDING):
    """Equal ids, and log-probs equal to `tolerance`."""
    np.testing.assert_array_equal(left.ids, right.ids)
    np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def same():
    return assert_same
