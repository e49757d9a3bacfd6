"""The pipeline: order, resumption, shards, filters, and bad examples."""

import dataclasses
import json
import logging

import pytest

from mmsr_jax.data import pipeline
from mmsr_jax.data.flags.world import World
from mmsr_jax.data.pipeline import DataConfig, Examples


@pytest.fixture(scope="module")
def config(small, data_dir):
    config = DataConfig(data_dir=data_dir)
    pipeline.prepare(config, small)
    return config


@pytest.fixture(scope="module")
def picture(small):
    return World(small).picture("NP", "capital", "train", 0)


def ids(iterator, count):
    return [next(iterator).id for _ in range(count)]


def record(picture, number=0, **fields):
    return {
        "id": f"r{number}".encode(),
        "question": b"What?",
        "image": picture,
        "answers": [b"Yes", b""],
        "source": b"test",
        "category": b"known",
        "entity": b"NP",
    } | fields


def test_examples_are_whole(config, small):
    made = next(pipeline.stream(config, small))
    assert made.source == "flags" and made.entity and made.answers and made.question
    assert made.image == World(small).picture(
        made.entity, "capital", "train", int(made.id.rsplit("-", 1)[1])
    )


def test_every_epoch_shows_each_example_once_in_a_new_order(config, small):
    stream = pipeline.stream(config, small)
    first, second = ids(stream, 27), ids(stream, 27)
    assert len(set(first)) == 27 and set(first) == set(second) and first != second


def test_same_seed_same_order(config, small):
    again = [ids(pipeline.stream(config, small), 40) for _ in range(2)]
    assert again[0] == again[1]
    other = dataclasses.replace(config, seed=1)
    assert ids(pipeline.stream(other, small), 40) != again[0]


def test_state_survives_json_and_continues_exactly(config, small):
    stream = pipeline.stream(config, small)
    whole = ids(stream, 60)
    stream = pipeline.stream(config, small)
    ids(stream, 31)
    state = json.loads(json.dumps(stream.state()))
    resumed = pipeline.stream(config, small)
    resumed.restore(state)
    assert ids(resumed, 29) == whole[31:]


def test_shards_divide_the_order_of_one_process(config, small):
    whole = ids(pipeline.stream(config, small), 30)
    parts = [
        ids(pipeline.stream(shard, small), 10)
        for shard in (
            dataclasses.replace(config, process_index=index, process_count=3) for index in range(3)
        )
    ]
    assert [part[i] for i in range(10) for part in parts] == whole


def test_state_means_the_same_under_another_process_count(config, small):
    whole = ids(pipeline.stream(config, small), 40)
    two = pipeline.stream(dataclasses.replace(config, process_index=1, process_count=2), small)
    ids(two, 6)  # both processes together have drawn 12
    one = pipeline.stream(config, small)
    one.restore(two.state())
    assert ids(one, 28) == whole[12:]
    five = pipeline.stream(dataclasses.replace(config, process_count=5), small)
    with pytest.raises(ValueError, match="next_index 12 is no whole number of rounds of 5"):
        five.restore(two.state())


def test_epochs_end_for_every_shard(config, small):
    for count in (1, 2):
        shards = [
            pipeline.stream(
                dataclasses.replace(config, epochs=2, process_index=i, process_count=count), small
            )
            for i in range(count)
        ]
        assert sum(len(list(shard)) for shard in shards) == 54


def test_without_shuffle_epochs_repeat(config, small):
    stream = pipeline.stream(dataclasses.replace(config, shuffle=False), small)
    assert ids(stream, 27) == ids(stream, 27)


def test_categories_filter(config, small):
    known = dataclasses.replace(config, categories=("known",), epochs=1)
    found = list(pipeline.stream(known, small))
    assert len(found) == 12 and {made.category for made in found} == {"known"}
    wrong = dataclasses.replace(config, categories=("never_shown",))
    with pytest.raises(ValueError, match="no category .'never_shown'.*known"):
        pipeline.stream(wrong, small)


def test_shares_hold_in_every_stretch_and_survive_a_stop(config, small):
    shared = dataclasses.replace(config, categories=("known", "unknown"), shares=(1.0, 2.0))
    stream = pipeline.stream(shared, small)
    drawn = [next(stream) for _ in range(60)]
    for start in range(0, 60, 6):
        kinds = [made.category for made in drawn[start : start + 6]]
        assert (kinds.count("known"), kinds.count("unknown")) == (2, 4)
    again = pipeline.stream(shared, small)
    ids(again, 25)
    continued = pipeline.stream(shared, small)
    continued.restore(again.state())
    assert ids(continued, 35) == [made.id for made in drawn[25:]]


def test_read_all_is_sorted_and_complete(config, small):
    test = dataclasses.replace(config, split="test", seed=5, process_index=1, process_count=4)
    found = pipeline.read_all(test, small)
    assert [made.id for made in found] == sorted(made.id for made in found)
    assert len(found) == 24
    assert len(pipeline.read_all(dataclasses.replace(test, split="test[:50%]"), small)) == 12


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"image": b""}, "the picture is empty"),
        ({"image": b"GIF89a broken"}, "picture"),
        ({"question": b"  "}, "the question is empty"),
        ({"question": b"x" * 2001}, "2001 characters, at most 2000"),
        ({"answers": []}, "there is no answer"),
        ({"answers": [b" "]}, "there is no answer"),
    ],
)
def test_a_bad_example_is_reported_skipped_and_counted(picture, caplog, fields, why):
    records = [record(picture, 0), record(picture, 1, **fields), record(picture, 2)]
    stream = Examples(records, DataConfig(shuffle=False))
    with caplog.at_level(logging.WARNING):
        assert ids(stream, 3) == ["r0", "r2", "r0"]
        assert stream.skipped == 1 and "r1" in caplog.text and why in caplog.text
        assert ids(stream, 1) == ["r2"] and stream.skipped == 2
        assert len(caplog.records) == 1  # counted every time, reported once
    resumed = Examples(records, DataConfig(shuffle=False))
    resumed.restore(stream.state())
    assert resumed.skipped == 2 and ids(resumed, 1) == ["r0"]


def test_truncated_picture_is_bad(picture):
    stream = Examples([record(picture), record(picture[:-2000], 1)], DataConfig(epochs=1))
    assert [made.id for made in stream] == ["r0"] and stream.skipped == 1


def test_only_bad_examples_end_in_one_error(picture):
    stream = Examples([record(picture, question=b"")] * 3, DataConfig())
    with pytest.raises(ValueError, match="all of 3 examples are bad.*question is empty"):
        next(stream)


def test_broken_text_does_not_end_a_run(picture):
    made = pipeline.example(record(picture, question=b"caf\xff?"))
    assert made.question == "caf\ufffd?" and made.answers == ("Yes",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"categories": ("known", "unknown"), "shares": (1.0,)}, "1 shares for 2 categories"),
        ({"categories": ("known",), "shares": (0.0,)}, "above 0"),
        ({"categories": ("known",), "shares": (float("nan"),)}, "above 0"),
        ({"categories": ("known",), "shares": (float("inf"),)}, "above 0"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not one of 2"),
        ({"epochs": 0}, "epochs must be at least 1 or None, not 0"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_unknown_names_are_refused(config, small):
    with pytest.raises(ValueError, match="no dataset 'fvqa_x', only"):
        pipeline.stream(dataclasses.replace(config, name="fvqa_x"))
    with pytest.raises(ValueError, match="validation"):
        pipeline.stream(dataclasses.replace(config, split="validation"), small)


def test_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pipeline.default_data_dir() == str(tmp_path / "mmsr_jax" / "data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pipeline.default_data_dir().endswith("/.cache/mmsr_jax/data")


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pipeline.pathlib.Path, "home", home)
    with pytest.raises(ValueError, match=r"HOME or XDG_CACHE_HOME.*data\.folder"):
        pipeline.default_data_dir()


class Rival:
    """A builder whose work another process has just done."""

    data_dir = "nowhere"

    def __init__(self, prepared):
        self.is_prepared = lambda: prepared

    def download_and_prepare(self):
        raise OSError("Directory not empty")


def test_a_lost_race_is_no_error_but_a_full_disk_is(monkeypatch):
    for second, outcome in ((True, None), (False, OSError)):
        made = iter([Rival(False), Rival(second)])
        monkeypatch.setitem(pipeline.BUILDERS, "raced", lambda *_, made=made: next(made))
        if outcome is None:
            assert pipeline.prepare(DataConfig(name="raced")).is_prepared()
        else:
            with pytest.raises(outcome, match="not empty"):
                pipeline.prepare(DataConfig(name="raced"))
