"""Rows of one CPU from look to look: they hold what lies in the pages, or are filled anew."""

import dataclasses

import jax
import numpy as np
import pytest

from mmsr_jax.engine import device as device_lib
from mmsr_jax.engine import steps
from mmsr_jax.engine.engine import Engine
from mmsr_jax.engine.requests import Request, stream
from mmsr_jax.engine.sequence import Status
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model import window
from mmsr_jax.train import step
from mmsr_jax.train.assemble import Piece, assemble

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere pages are read where they lie"
)
CLOSE = 1e-5  # a token's log-prob where products have other shapes


def finish(engine):
    turns = {}
    while engine.busy:
        turns |= {turn.number: turn for turn in engine.step(1.0)}
    return turns


class Forgetful(Engine):
    """Fills all rows anew for each look."""

    def step(self, temperature):
        self.device.seated = [None] * self.config.rows
        return super().step(temperature)


@pytest.mark.parametrize("pages, rows", [(9, 2), (14, 3), (40, 3)])
def test_rows_that_are_kept_equal_rows_filled_anew(tiny, plans, play, same, pages, rows):
    """To the bit, while pages are stolen, shared, copied and given to others."""
    config = dataclasses.replace(tiny.engine_config, pages=pages, rows=rows)
    forgetful = Forgetful(tiny.graph, tiny.model, config, ())
    forgetful.set_params(tiny.params())
    usual = tiny.engine(config=config)
    kept, filled = (
        play(engine, plans, samples=3, arrival=np.random.default_rng(1))
        for engine in (usual, forgetful)
    )
    assert usual.counters == forgetful.counters
    for left, right in zip(kept, filled, strict=True):
        same(left, right)


def test_a_row_that_rests_for_want_of_pages_is_as_it_was(tiny, same):
    """Nine pages, two conversations of four: the senior takes the last one and goes on alone."""
    prompt = tiny.prompt("?" * 52)
    assert len(prompt) == 60  # five tokens more, and both need a fifth page
    engines = [
        tiny.engine(config=dataclasses.replace(tiny.engine_config, rows=2, pages=pages))
        for pages in (9, 40)
    ]
    turns = []
    for engine in engines:
        for n in range(2):  # each fed for itself
            engine.submit(Request(prompt, (stream(n),), 14))
        while engine.schedule.count(Status.RUNNING) < 2:
            assert engine.step(1.0) == []
        seated = list(engine.device.seated)
        engine.step(1.0)
        rests = engine.schedule.sequences[1].status is Status.READY
        assert rests == (engine is engines[0])
        turns.append(finish(engine))
        assert engine.device.seated == seated  # nobody was fed or moved
    for number in (0, 1):
        same(turns[0][number], turns[1][number])


@pytest.mark.parametrize("keep", [False, True])
def test_new_weights_find_rows_as_they_should_be(tiny, same, keep):
    prompt, keys = tiny.prompt("What capital of Portugal?"), tuple(map(stream, range(3)))
    config = dataclasses.replace(tiny.engine_config, rows=2)
    turns = []
    for kind in (Engine, Forgetful):
        engine = kind(tiny.graph, tiny.model, config, ())
        engine.set_params(tiny.params(0))
        engine.submit(Request(prompt, keys, 14))
        engine.step(1.0)
        engine.set_params(tiny.params(1), keep_cache=keep)
        turns.append(finish(engine))
    assert sorted(turns[0]) == sorted(turns[1]) == [0, 1, 2]
    for number, turn in turns[0].items():
        same(turn, turns[1][number])


@pytest.mark.parametrize("rows, slots, blocks", [(1, 126, 2), (2, 125, 8), (1, 128, 1)])
def test_rows_of_several_blocks(tiny, plans, play, same, rows, slots, blocks, monkeypatch):
    """Slots that are neither whole pages nor whole blocks, and a single row."""
    wanted = play(tiny.engine(), plans)
    monkeypatch.setattr(window, "SLOTS", 128 // blocks)
    config = dataclasses.replace(tiny.engine_config, rows=rows, slots=slots)
    engine = tiny.engine(config=config)
    assert len(engine.device.window[0].keys) == blocks
    for left, right in zip(play(engine, plans), wanted, strict=True):
        same(left, right, CLOSE)


def test_bfloat16_on_one_cpu(tiny, plans, play):
    """The sampler's log-probs are the trainer's but for rounding."""
    model = dataclasses.replace(tiny.model, dtype="bfloat16")
    graph, params = qwen.abstract(model)[0], tiny.params()
    engine = Engine(graph, model, tiny.engine_config, ())
    engine.set_params(params)
    assert engine.device.window[0].values[0].dtype == "bfloat16"
    pieces = [Piece(t) for t in play(engine, plans[1:3])]
    (batch,) = assemble(pieces, model, tiny.pack, aggregate="token")
    trained = step.logprobs(graph, params, batch, np.float32(1))
    gap = np.abs(trained - batch.sampler_logprobs)[batch.mask > 0]
    assert gap.mean() < 0.02 and gap.max() < 0.1


def test_a_look_that_failed_may_be_tried_again(tiny, same):
    """Before its program ran: nobody sits where the host thought."""
    prompt, keys = tiny.prompt("What capital?"), (stream(0), stream(1))
    clean = tiny.engine()
    clean.submit(Request(prompt, keys, 9))
    engine = tiny.engine()
    engine.submit(Request(prompt, keys, 9))
    with pytest.raises(ValueError, match="warm"):
        engine.step("warm")
    found, wanted = finish(engine), finish(clean)
    for number in wanted:
        same(found[number], wanted[number])


def test_a_look_whose_end_nobody_saw_is_taken_again(tiny, same, monkeypatch):
    """After its program ran: rows hold tokens that the host has never seen."""
    prompt, keys = tiny.prompt("What capital?"), (stream(0), stream(1))
    clean = tiny.engine()
    clean.submit(Request(prompt, keys, 9))
    engine = tiny.engine()
    engine.submit(Request(prompt, keys, 9))
    engine.step(1.0)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device_lib.jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step(1.0)
    found, wanted = finish(engine), finish(clean)
    for number in wanted:
        same(found[number], wanted[number])


def test_what_could_not_be_fed_is_fed_again(tiny, same):
    """One picture breaks an extension: the others in it are not taken for fed."""
    prompt, key = tiny.prompt("What capital of Portugal?"), stream("good")
    picture = tiny.picture(4, 6)
    broken = dataclasses.replace(picture, patches=picture.patches[:, :-1])
    engine, clean = tiny.engine(), tiny.engine()
    (number,) = engine.submit(Request(prompt, (key,), 9))
    (bad,) = engine.submit(Request(tiny.prompt(broken), (key,), 9))
    with pytest.raises(ValueError, match="patches of .* numbers, config says"):
        engine.step(1.0)
    engine.release(bad)
    (other,) = clean.submit(Request(prompt, (key,), 9))
    same(finish(engine)[number], finish(clean)[other])
    engine.release(number)
    assert engine.free_pages == engine.schedule.pool.total


def test_a_conversation_of_no_numbers_leaves_nothing_to_the_next(tiny, same):
    """Its pages go to others, who fill them from the front only."""
    picture = tiny.picture(6, 10)
    broken = dataclasses.replace(picture, patches=np.full_like(picture.patches, np.nan))
    engine, clean = tiny.engine(), tiny.engine()
    (number,) = engine.submit(Request(tiny.prompt(broken, "What?" * 9), (stream(0),), 9))
    turn = finish(engine)[number]
    assert np.isnan(turn.logprobs).all()
    engine.release(number)
    prompts = [tiny.prompt("What capital" + "?" * n) for n in range(8, 12)]
    for n, prompt in enumerate(prompts):
        (number,) = engine.submit(Request(prompt, (stream(n),), 9))
        (other,) = clean.submit(Request(prompt, (stream(n),), 9))
        found = finish(engine)[number]
        assert np.isfinite(found.logprobs).all()
        same(found, finish(clean)[other])


def test_decoding_copies_neither_pages_nor_rows(tiny):
    """Both much larger than all else: a second one would be seen."""
    config = dataclasses.replace(tiny.engine_config, rows=2, slots=4096, page=32)
    engine = tiny.engine(config=config)
    device, ints = engine.device, lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
    rows = steps.Rows(
        *[ints(2)] * 5,
        keys=jax.ShapeDtypeStruct((2, 2), np.uint32),
        tables=ints(2, device.table),
        fresh=jax.ShapeDtypeStruct((2,), bool),
    )
    program = steps.decode.lower(
        device.graph, device.params, device.kv, device.window, rows,
        np.float32(1), np.int32(1), (), config.decode_steps,
    ).compile()  # fmt: skip
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((device.kv, device.window)))
    found = program.memory_analysis()
    assert found.alias_size_in_bytes >= held
    assert found.temp_size_in_bytes < 0.1 * held, (found.temp_size_in_bytes, held)
