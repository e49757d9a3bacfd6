"""Five hundred random trajectories through a pool that is too small for those in flight.

0 to 3 tool rounds, 0 to 6 pictures, prompts longer than a part, samples that share their prompt,
tools that answer late and in any order.
"""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.engine.engine import EngineConfig
from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.inputs import chat
from mmsr_jax.parallel import compiles
from mmsr_jax.train import step
from mmsr_jax.train.assemble import PackConfig, Piece, assemble
from mmsr_jax.types import Author

CONFIG = EngineConfig(
    rows=16, slots=224, page=16, pages=70, turn_tokens=12, decode_steps=6, refill=3, extend_rows=8,
    extend_tokens=12, patches=160, pictures=8, picture_patches=60, feature_rows=160,
)  # fmt: skip
PACK = PackConfig(rows=4, length=448, patches=960, pictures=48, picture_patches=60)
WORDS = ("What capital of Portugal is this? ", "Porto, Lisbon, Paris. ", "Look: ", "?")


@dataclasses.dataclass
class Talk:
    """What is said to the model, and what has been said so far."""

    tools: list[tuple]
    budgets: list[int]
    key: tuple
    tokens: object
    spoken: int = 0


def parts(tiny, rng, pictures):
    """A message of words and `pictures` pictures in any order."""
    words = [WORDS[rng.integers(len(WORDS))] * int(rng.integers(1, 4)) for _ in range(2)]
    shapes = ((2, 4), (4, 2), (4, 6), (6, 10))
    shown = [
        tiny.picture(*shapes[rng.integers(len(shapes))], seed=int(rng.integers(12)))
        for _ in range(pictures)
    ]
    mixed = words + shown
    return tuple(mixed[i] for i in rng.permutation(len(mixed)))


def draw(tiny, rng, name):
    """A prompt, and the talks of its samples."""
    pictures = rng.multinomial(int(rng.integers(0, 7)), [0.25] * 4)
    prompt = tiny.prompt(*parts(tiny, rng, pictures[0]))
    talks = []
    for sample in range(int(rng.integers(1, 6))):
        rounds = int(rng.integers(0, 4))
        tools = [parts(tiny, rng, pictures[1 + n]) for n in range(rounds)]
        budgets = rng.integers(1, CONFIG.turn_tokens + 1, size=rounds + 1).tolist()
        talks.append(Talk(tools, budgets, (name, sample), prompt))
    return prompt, talks


@pytest.fixture(scope="module")
def played(tiny):
    """All trajectories, the engine, and the programs compiled after its warm-up."""
    rng = np.random.default_rng(0)
    engine = tiny.engine(config=CONFIG)
    engine.warm_up()
    before, free = compiles.count(), engine.free_pages
    live, paused, done = {}, [], []
    while len(done) < 500 or live:
        while len(done) + len(live) < 500 and engine.live < 40:
            prompt, talks = draw(tiny, rng, len(done) + len(live))
            keys = tuple(stream(*talk.key) for talk in talks)
            # One budget a request: each sample's own first budget is the smallest of the group.
            first = min(talk.budgets[0] for talk in talks)
            for talk in talks:
                talk.budgets[0] = first
            numbers = engine.submit(Request(prompt, keys, first))
            live |= dict(zip(numbers, talks, strict=True))
        for turn in engine.step(1.0):
            talk = live[turn.number]
            assert turn.ids.size == talk.budgets[talk.spoken]
            piece = chat.model_turn(turn.ids, turn.logprobs, talk.tokens.next_position)
            talk.tokens = chat.join(talk.tokens, piece)
            talk.spoken += 1
            if talk.spoken > len(talk.tools):
                engine.release(turn.number)
                done.append(live.pop(turn.number).tokens)
            else:
                paused.append(turn.number)
        for number in [n for n in paused if rng.random() < 0.3]:
            talk = live[number]
            piece = tiny.tool(talk.tokens, *talk.tools[talk.spoken - 1])
            room = CONFIG.slots - len(talk.tokens) - len(piece)
            paused.remove(number)
            if room < sum(talk.budgets[talk.spoken :]) + 40:  # it would not fit: let it end here
                engine.release(number)
                done.append(live.pop(number).tokens)
                continue
            talk.tokens = chat.join(talk.tokens, piece)
            budget = talk.budgets[talk.spoken]
            engine.resume(Resume(number, piece, talk.tokens.pictures, budget))
    assert engine.free_pages == free and not engine.live
    return done, engine, compiles.count() - before


def test_nothing_compiles_after_warm_up(played):
    done, engine, compiled = played
    assert len(done) >= 500 and compiled == 0
    counters = engine.counters
    # The pool was too small, and features were pushed out: what this is about has happened.
    assert counters["dropped"] > 50 and counters["again_tokens"] > 500
    assert len({len(t.pictures) for t in done}) >= 6


def test_log_probs_equal_the_trainers(tiny, played):
    """Issue 4 asks for 1e-4 a token over 200 of them."""
    done, _, _ = played
    chosen = sorted(done, key=lambda t: len(t.pictures))[:: len(done) // 200][:200]
    worst, compared = 0.0, 0
    for start in range(0, len(chosen), 8):
        pieces = [Piece(tokens) for tokens in chosen[start : start + 8]]
        for batch in assemble(pieces, tiny.model, PACK, aggregate="token"):
            trained = step.logprobs(tiny.graph, tiny.params(), batch, np.float32(1))
            gap = np.abs(np.asarray(trained) - batch.sampler_logprobs) * batch.mask
            worst, compared = max(worst, float(gap.max())), compared + int(batch.mask.sum())
    expected = sum(int((t.authors == Author.MODEL).sum()) for t in chosen)
    print(f"\n{len(chosen)} trajectories, {compared} tokens: at most {worst:.1e} a token")
    assert len(chosen) == 200 and compared == expected > 2000
    assert worst < 2e-5


def test_samples_do_not_depend_on_the_number_of_rows(tiny, plans, play, same):
    """Programs of another width round otherwise in the last bits; the tokens are the same."""
    expected = play(tiny.engine(), plans, samples=2)
    for rows in (1, 3, 17):
        config = dataclasses.replace(tiny.engine_config, rows=rows, extend_rows=2 + rows, pages=90)
        for left, right in zip(
            play(tiny.engine(config=config), plans, samples=2), expected, strict=True
        ):
            same(left, right, 1e-5)
