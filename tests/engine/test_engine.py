"""Rows that come and go, groups from one prefill, the pool of pictures, limits, compile counts."""

import dataclasses

import numpy as np
import pytest

from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.inputs import chat
from mmsr_jax.parallel import compiles


def finish(engine, temperature=1.0):
    """Steps until every trajectory has paused: number -> SampledTurn."""
    turns = {}
    while engine.busy:
        turns |= {turn.number: turn for turn in engine.step(temperature)}
    return turns


def sample(engine, prompt, streams, budget=9):
    """The turns of one group, which is forgotten afterwards."""
    numbers = engine.submit(Request(prompt, streams, budget))
    turns = finish(engine)
    for number in numbers:
        engine.release(number)
    return [turns[number] for number in numbers]


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
    streams = [tuple(stream(n, s) for s in range(5)) for n in range(2)]
    groups = [engine.submit(Request(p, s, 6)) for p, s in zip(prompts, streams, strict=True)]
    turns = finish(engine)
    assert engine.counters["prefill_tokens"] == sum(len(p) - 1 for p in prompts)
    # Each sample but the last to write has its own copy of the last, partly filled page.
    assert engine.counters["copied_pages"] == 2 * (5 - 1)
    for numbers, prompt, keys in zip(groups, prompts, streams, strict=True):
        expected = sample(tiny.engine(), prompt, keys, 6)
        for number, turn in zip(numbers, expected, strict=True):
            same(turns[number], turn)


def test_newcomers_leave_running_and_paused_trajectories_alone(tiny, same):
    prompt, other = tiny.prompt("What capital?"), tiny.prompt(tiny.picture(4, 6), "Lisbon?")
    expected = sample(tiny.engine(), prompt, (stream("x"),), 12)[0]
    engine = tiny.engine()
    (long,) = engine.submit(Request(prompt, (stream("x"),), 12))
    (paused,) = engine.submit(Request(other, (stream("y"),), 2))
    first = {turn.number: turn for turn in engine.step(1.0)}
    assert set(first) == {paused} and engine.busy  # five steps: the other is on its way
    engine.submit(Request(other, (stream("y"), stream("z")), 3))
    same(finish(engine)[long], expected)
    tool = tiny.tool(after(other, first[paused]), "Portugal: Lisbon")
    engine.resume(Resume(paused, tool, other.pictures, 4))
    again = tiny.engine()
    (number,) = again.submit(Request(other, (stream("y"),), 2))
    finish(again)
    again.resume(Resume(number, tool, other.pictures, 4))
    same(finish(engine)[paused], finish(again)[number])


def test_released_trajectories_leak_nothing_into_the_next(tiny, same):
    engine = tiny.engine()
    pages = engine.free_pages
    long = tiny.prompt(tiny.picture(6, 10), "What capital of Portugal? " * 3)
    for n in range(2):
        sample(engine, long, tuple(stream(n, s) for s in range(6)), 12)
    assert engine.free_pages == pages and not engine.live
    short = tiny.prompt("What?")
    keys = tuple(stream("after", s) for s in range(6))
    for used, fresh in zip(
        sample(engine, short, keys), sample(tiny.engine(), short, keys), strict=True
    ):
        same(used, fresh)


def test_a_trajectory_may_be_released_in_the_middle_of_its_turn(tiny, same):
    engine = tiny.engine()
    pages = engine.free_pages
    prompt = tiny.prompt("What capital?")
    first, second = engine.submit(Request(prompt, (stream(0), stream(3)), 12))
    assert engine.step(1.0) == [] and engine.busy
    engine.release(first)
    same(finish(engine)[second], sample(tiny.engine(), prompt, (stream(3),), 12)[0])
    engine.release(second)
    assert not engine.busy and engine.free_pages == pages
    prompt = tiny.prompt("Paris?")
    same(sample(engine, prompt, (stream(1),))[0], sample(tiny.engine(), prompt, (stream(1),))[0])


def test_more_trajectories_than_rows_take_turns(tiny, same):
    engine = tiny.engine()
    prompts = [tiny.prompt("What capital? " * (1 + n % 3), f"{n}") for n in range(7)]
    groups = [
        engine.submit(Request(p, tuple(stream(n, s) for s in range(3)), 3 + n))
        for n, p in enumerate(prompts)
    ]
    turns = finish(engine)
    assert len(turns) == 21 > tiny.engine_config.rows
    for n, (numbers, prompt) in enumerate(zip(groups, prompts, strict=True)):
        for s, number in enumerate(numbers):
            alone = sample(tiny.engine(), prompt, (stream(n, s),), 3 + n)[0]
            same(turns[number], alone)


def test_a_paused_trajectory_gives_up_its_row_but_not_its_pages(tiny):
    engine = tiny.engine()
    prompt = tiny.prompt("What capital?")
    for n in range(2 * tiny.engine_config.rows):
        engine.submit(Request(prompt, (stream(n),), 2))
    finish(engine)
    held = engine.free_pages
    assert engine.live == 2 * tiny.engine_config.rows and held < engine.schedule.pool.total
    engine.submit(Request(prompt, (stream("late"),), 2))
    assert len(finish(engine)) == 1 and engine.counters["dropped"] == 0


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


def test_slots_need_not_be_whole_pages(tiny):
    config = dataclasses.replace(tiny.engine_config, slots=98)
    engine = tiny.engine(config=config)
    filler = tiny.prompt("?" * (98 - len(tiny.prompt("")) - 2))
    (turn,) = sample(engine, filler, (stream(5),), 12)
    assert len(filler) == 96 and turn.ids.size == 3 and not turn.stopped


def test_counters(tiny):
    engine = tiny.engine()
    sample(engine, tiny.prompt("What capital?"), (stream(0), stream(1)), 9)
    assert engine.counters["sampled_tokens"] == 18
    assert engine.counters["decode_steps"] == 9  # 5 and 4: it stops when all have paused
    assert engine.counters["row_steps"] == 9 * tiny.engine_config.rows


def test_equal_pictures_are_encoded_once_until_the_weights_change(tiny):
    engine = tiny.engine()
    prompt = tiny.prompt(tiny.picture(4, 6), tiny.picture(2, 4), tiny.picture(2, 4), "What?")
    sample(engine, prompt, (stream(0), stream(1)), 1)
    sample(engine, tiny.prompt(tiny.picture(2, 4)), (stream(2),), 1)
    assert engine.counters["encoded_pictures"] == 2
    engine.set_params(engine.params)
    sample(engine, prompt, (stream(3),), 1)
    assert engine.counters["encoded_pictures"] == 4


def test_new_weights_see_pictures_anew(tiny, same):
    prompt, keys = tiny.prompt(tiny.picture(4, 6), "What?"), (stream(0),)
    engine = tiny.engine(tiny.params(0))
    sample(engine, prompt, keys)
    engine.set_params(tiny.params(1))
    same(sample(engine, prompt, keys)[0], sample(tiny.engine(tiny.params(1)), prompt, keys)[0])


def test_a_full_ring_of_features_forgets_the_oldest(tiny, same):
    """120 rows of features hold eight pictures of 15; later ones push the first ones out."""
    engine = tiny.engine()
    prompts = [tiny.prompt(tiny.picture(6, 10, seed=n), "What?") for n in range(9)]
    for n, prompt in enumerate([*prompts, *prompts[::-1]]):
        turn = sample(engine, prompt, (stream("pool", n),), 4)[0]
        same(turn, sample(tiny.engine(), prompt, (stream("pool", n),), 4)[0])
    assert 9 < engine.counters["encoded_pictures"] < 18  # some were still there


def test_more_pictures_in_one_prompt_than_the_ring_holds(tiny, same):
    many = tiny.prompt(*(tiny.picture(6, 10, seed=n) for n in range(7)))
    roomy = dataclasses.replace(tiny.engine_config, feature_rows=240)
    found = sample(tiny.engine(), many, (stream(0),), 4)[0]
    same(found, sample(tiny.engine(config=roomy), many, (stream(0),), 4)[0])


def test_what_cannot_be_served_is_refused_with_both_numbers(tiny):
    engine = tiny.engine()
    prompt = tiny.prompt("What?")
    with pytest.raises(ValueError, match=r"of \d+ tokens does not fit in 128 cache slots"):
        engine.submit(Request(tiny.prompt("?" * 130), (stream(0),), 4))
    with pytest.raises(ValueError, match="budget of 17 tokens.*turn_tokens is 16"):
        engine.submit(Request(prompt, (stream(0),), 17))
    with pytest.raises(ValueError, match="picture of 80 patches is larger than the 64"):
        engine.submit(Request(tiny.prompt(tiny.picture(8, 10)), (stream(0),), 4))
    lost = dataclasses.replace(tiny.prompt(tiny.picture(4, 6), "What?"), pictures=())
    with pytest.raises(ValueError, match="more image placeholders than images: .* row 5 .* 0 rows"):
        engine.submit(Request(lost, (stream(0),), 4))
    assert not engine.live and not engine.busy
    small = dataclasses.replace(tiny.engine_config, pages=8)
    with pytest.raises(ValueError, match="engine.pages is 8, .* = 128 tokens alone needs 9"):
        tiny.engine(config=small)
    narrow = dataclasses.replace(tiny.engine_config, feature_rows=20)
    with pytest.raises(ValueError, match="feature_rows is 20, .* writes 24 rows"):
        tiny.engine(config=narrow)
    (number,) = engine.submit(Request(prompt, (stream(0),), 4))
    with pytest.raises(ValueError, match=f"trajectory {number} is feeding, not paused"):
        engine.resume(Resume(number, prompt, (), 4))
    finish(engine)
    long = tiny.tool(prompt, "?" * 130)
    with pytest.raises(ValueError, match="does not fit in 128 cache slots"):
        engine.resume(Resume(number, long, (), 4))
    assert engine.length(number) == len(prompt) + 4


def test_nothing_compiles_after_warm_up(tiny, plans, play):
    """Other lengths, pictures, numbers of rows, temperatures and weights are data."""
    engine = tiny.engine()
    engine.warm_up()
    before = compiles.count()
    play(engine, plans)
    play(engine, plans[1:3], temperature=0.0)
    sample(engine, tiny.prompt("What capital of Portugal?"), tuple(map(stream, range(5))), 12)
    engine.set_params(tiny.params(1))
    play(engine, plans, arrival=np.random.default_rng(0))
    assert compiles.count() == before
