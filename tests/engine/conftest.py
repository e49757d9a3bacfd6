"""Conversations played through an engine directly: no parsing, no tools, only their words."""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.engine.requests import Request, Resume, stream
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
    """play(engine, plans) -> Tokens of each whole conversation; every page is given back."""

    def run(engine, plans, temperature=1.0, arrival=None, samples=1):
        """`arrival`: a numpy generator that makes tools answer late and in any order.

        With `samples` > 1 each plan is played so many times, from one prompt.
        """
        free = engine.free_pages
        said, plan_of = {}, {}
        for plan in plans:
            keys = [stream(*plan.key, *((n,) if samples > 1 else ())) for n in range(samples)]
            request = Request(tiny.prompt(*plan.first), tuple(keys), plan.budgets[0])
            for number in engine.submit(request):
                said[number], plan_of[number] = (request.prompt, 0), plan
        paused = []
        while engine.busy or paused:
            for turn in engine.step(temperature):
                tokens, spoken = said[turn.number]
                piece = chat.model_turn(turn.ids, turn.logprobs, tokens.next_position)
                said[turn.number] = (chat.join(tokens, piece), spoken + 1)
                if spoken < len(plan_of[turn.number].tools):
                    paused.append(turn.number)
            woken = [number for number in paused if arrival is None or arrival.random() < 0.4]
            if arrival is not None:
                arrival.shuffle(woken)
            for number in woken:
                paused.remove(number)
                tokens, spoken = said[number]
                plan = plan_of[number]
                piece = tiny.tool(tokens, *plan.tools[spoken - 1])
                said[number] = (chat.join(tokens, piece), spoken)
                pictures = said[number][0].pictures
                engine.resume(Resume(number, piece, pictures, plan.budgets[spoken]))
        for number, (tokens, _) in said.items():
            assert engine.length(number) == len(tokens)
            engine.release(number)
        assert engine.free_pages == free
        return [tokens for tokens, _ in said.values()]

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
