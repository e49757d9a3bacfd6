"""Rows that come and go, groups from one prefill, the pool of pictures, limits, compile counts."""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.engine import steps
from mmsr_jax.engine.engine import Request, Resume, stream
from mmsr_jax.inputs import chat
from mmsr_jax.parallel import compiles


def finish(engine, temperature=1.0):
    """Decodes until every row has paused: row -> SampledTurn."""
    turns = {}
    while engine.running:
        turns |= {turn.row: turn for turn in engine.decode(temperature)}
    return turns


def sample(engine, prompt, streams, budget=9):
    """The turns of one group, whose rows are given back."""
    (rows,) = engine.admit([Request(prompt, streams, budget)])
    turns = finish(engine)
    for row in rows:
        engine.release(row)
    return [turns[row] for row in rows]


def after(prompt, turn):
    """The conversation once the model has spoken."""
    spoken = chat.model_turn(turn.ids, turn.logprobs, prompt.next_position)
    return chat.join(prompt, spoken)


def test_streams_are_named_by_all_their_parts():
    names = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    streams = [stream(*name) for name in names]
    assert len({tuple(s) for s in streams}) == len(names)
    assert (stream(*names[0]) == streams[0]).all()
    assert streams[0].shape == (2,) and streams[0].dtype == np.uint32


def test_samples_of_one_prefill_equal_those_of_prefills_alone(tiny, same):
    prompt = tiny.prompt(tiny.picture(6, 10), "What capital?")
    streams = tuple(stream("fork", n) for n in range(5))
    group = sample(tiny.engine(), prompt, streams)
    assert len({tuple(turn.ids) for turn in group}) == 5
    alone = tiny.engine()
    for key, turn in zip(streams, group, strict=True):
        same(sample(alone, prompt, (key,))[0], turn)


def test_a_group_is_prefilled_once_beside_others(tiny, same):
    engine = tiny.engine()
    prompts = [tiny.prompt(tiny.picture(4, 6), "What?"), tiny.prompt("Paris or Porto?")]
    streams = [tuple(stream(n, s) for s in range(3)) for n in range(2)]
    admitted = engine.admit([Request(p, s, 6) for p, s in zip(prompts, streams, strict=True)])
    assert engine.counters["prefill_tokens"] == sum(len(p) - 1 for p in prompts)
    turns = finish(engine)
    for rows, prompt, keys in zip(admitted, prompts, streams, strict=True):
        expected = sample(tiny.engine(), prompt, keys, 6)
        for row, turn in zip(rows, expected, strict=True):
            same(turns[row], turn)


def test_a_fork_leaves_running_and_paused_rows_alone(tiny, same):
    prompt, other = tiny.prompt("What capital?"), tiny.prompt(tiny.picture(4, 6), "Lisbon?")
    expected = sample(tiny.engine(), prompt, (stream("x"),), 12)[0]
    engine = tiny.engine()
    ((row,),) = engine.admit([Request(prompt, (stream("x"),), 12)])
    ((paused,),) = engine.admit([Request(other, (stream("y"),), 2)])
    first = {turn.row: turn for turn in engine.decode(1.0)}
    assert set(first) == {paused} and engine.running  # five steps: the other row is on its way
    engine.admit([Request(other, (stream("y"), stream("z")), 3)])
    same(finish(engine)[row], expected)
    tool = tiny.tool(after(other, first[paused]), "Portugal: Lisbon")
    engine.extend([Resume(paused, tool, other.pictures, 4)])
    again = tiny.engine()
    ((row,),) = again.admit([Request(other, (stream("y"),), 2)])
    finish(again)
    again.extend([Resume(row, tool, other.pictures, 4)])
    same(finish(engine)[paused], finish(again)[row])


def test_released_rows_leak_nothing_into_the_next(tiny, same):
    engine = tiny.engine()
    long = tiny.prompt(tiny.picture(6, 10), "What capital of Portugal? " * 3)
    for n in range(2):
        sample(engine, long, tuple(stream(n, s) for s in range(6)), 12)
    assert engine.free_rows == tiny.engine_config.rows
    short = tiny.prompt("What?")
    keys = tuple(stream("after", s) for s in range(6))
    for used, fresh in zip(
        sample(engine, short, keys), sample(tiny.engine(), short, keys), strict=True
    ):
        same(used, fresh)


def test_a_row_released_in_the_middle_of_its_turn_is_free(tiny, same):
    engine = tiny.engine()
    ((row,),) = engine.admit([Request(tiny.prompt("What capital?"), (stream(0),), 12)])
    assert engine.decode(1.0) == [] and engine.running
    engine.release(row)
    assert not engine.running and engine.free_rows == 6
    prompt = tiny.prompt("Paris?")
    same(sample(engine, prompt, (stream(1),))[0], sample(tiny.engine(), prompt, (stream(1),))[0])


def test_rows_pause_at_an_end_token_their_budget_or_the_last_slot(tiny):
    prompt = tiny.prompt("What capital?")
    free = sample(tiny.engine(), prompt, (stream(5),), 12)[0]
    assert not free.stopped and free.ids.size == 12
    # The same stream with its fourth token made an end token.
    stop = int(free.ids[3])
    turn = sample(tiny.engine(eos_ids=(stop, 383)), prompt, (stream(5),), 12)[0]
    where = int(np.flatnonzero(free.ids == stop)[0])
    assert turn.stopped and turn.ids.tolist() == free.ids[: where + 1].tolist()
    assert sample(tiny.engine(), prompt, (stream(5),), 1)[0].ids.tolist() == free.ids[:1].tolist()
    # A prompt that leaves room for three: its last token and two more enter the cache.
    slots = tiny.engine_config.slots
    filler = tiny.prompt("?" * (slots - len(tiny.prompt("")) - 2))
    assert len(filler) == slots - 2
    turn = sample(tiny.engine(), filler, (stream(5),), 12)[0]
    assert turn.ids.size == 3 and not turn.stopped


def test_counters(tiny):
    engine = tiny.engine()
    sample(engine, tiny.prompt("What capital?"), (stream(0), stream(1)), 9)
    assert engine.counters["sampled_tokens"] == 18
    assert engine.counters["decode_steps"] == 9  # 5 and 4: it stops when all have paused
    assert engine.counters["row_steps"] == 9 * tiny.engine_config.rows


def test_equal_pictures_are_encoded_once_until_the_weights_change(tiny, monkeypatch):
    seen = []
    encode = steps.encode
    monkeypatch.setattr(steps, "encode", lambda *args: seen.append(args[4]) or encode(*args))
    engine = tiny.engine()
    prompt = tiny.prompt(tiny.picture(4, 6), tiny.picture(2, 4), tiny.picture(2, 4), "What?")
    engine.admit([Request(prompt, (stream(0),), 1), Request(prompt, (stream(1),), 1)])
    engine.admit([Request(tiny.prompt(tiny.picture(2, 4)), (stream(2),), 1)])
    assert len(seen) == 1 and engine._pool_used == 6 + 2
    engine.set_params(engine.params)
    assert engine._pool_used == 0
    engine.admit([Request(prompt, (stream(3),), 1)])
    assert len(seen) == 2


def test_new_weights_see_pictures_anew(tiny, same):
    prompt, keys = tiny.prompt(tiny.picture(4, 6), "What?"), (stream(0),)
    engine = tiny.engine(tiny.params(0))
    sample(engine, prompt, keys)
    engine.set_params(tiny.params(1))
    same(sample(engine, prompt, keys)[0], sample(tiny.engine(tiny.params(1)), prompt, keys)[0])


def test_a_full_pool_is_emptied_between_extensions(tiny, same):
    """120 rows of features hold five passes of 24; later pictures push the first ones out."""
    engine = tiny.engine()
    prompts = [tiny.prompt(tiny.picture(6, 10, seed=n), "What?") for n in range(9)]
    for n, prompt in enumerate([*prompts, *prompts[::-1]]):
        turn = sample(engine, prompt, (stream("pool", n),), 4)[0]
        same(turn, sample(tiny.engine(), prompt, (stream("pool", n),), 4)[0])
        assert engine._pool_used <= tiny.engine_config.feature_rows


def test_more_than_fits_is_refused_with_both_numbers(tiny):
    engine = tiny.engine()
    prompt = tiny.prompt("What?")
    with pytest.raises(ValueError, match="7 samples do not fit in 6 free rows"):
        engine.admit([Request(prompt, tuple(stream(n) for n in range(7)), 4)])
    with pytest.raises(ValueError, match=r"of \d+ tokens does not fit in 128 cache slots"):
        engine.admit([Request(tiny.prompt("?" * 130), (stream(0),), 4)])
    with pytest.raises(ValueError, match="budget of 17 tokens.*turn_tokens is 16"):
        engine.admit([Request(prompt, (stream(0),), 17)])
    with pytest.raises(ValueError, match="picture of 80 patches is larger than the 64"):
        engine.admit([Request(tiny.prompt(tiny.picture(8, 10)), (stream(0),), 4)])
    many = tiny.prompt(*(tiny.picture(6, 10, seed=n) for n in range(6)))
    with pytest.raises(ValueError, match="feature pool, engine.feature_rows is 120"):
        engine.admit([Request(many, (stream(0),), 4)])
    lost = dataclasses.replace(tiny.prompt(tiny.picture(4, 6), "What?"), pictures=())
    with pytest.raises(ValueError, match="more image placeholders than images: .* row 5 .* 0 rows"):
        engine.admit([Request(lost, (stream(0),), 4)])
    # A refusal takes no rows with it.
    assert engine.free_rows == 6 and not engine.running
    assert len(sample(engine, prompt, (stream(0), stream(1)))) == 2


def test_nothing_compiles_once_every_program_has_run(tiny, plans, play):
    engine = tiny.engine()
    sample(engine, tiny.prompt(tiny.picture(2, 4), "What?"), (stream(0), stream(1)), 2)
    # Vision, extension, fork, decoding have run once. Other lengths, pictures, numbers of rows,
    # temperatures and weights are data.
    before = compiles.count()
    play(engine, plans)
    play(engine, plans[1:3], temperature=0.0)
    sample(engine, tiny.prompt("What capital of Portugal?"), tuple(map(stream, range(5))), 12)
    engine.set_params(tiny.params(1))
    play(engine, plans, arrival=np.random.default_rng(0))
    assert compiles.count() == before
