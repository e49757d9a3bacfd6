"""The TFDS builder: what it writes, and that it needs no TensorFlow."""

import collections
import dataclasses
import io
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmsr_jax.data import pipeline
from mmsr_jax.data.flags.builder import flags_builder
from mmsr_jax.data.flags.world import World
from mmsr_jax.data.pipeline import DataConfig


@pytest.fixture(scope="module")
def builder(small, data_dir):
    return pipeline.prepare(DataConfig(data_dir=data_dir), small)


def records(builder, split):
    decoders = {"image": tfds.decode.SkipDecoding()}
    return list(builder.as_data_source(split=split, decoders=decoders))


def test_records_tell_the_whole_truth(builder, small):
    world = World(small)
    for record in records(builder, "test"):
        key, entity = record["id"].decode(), record["entity"].decode()
        _, attribute, split, number = key.split("-")
        assert record["image"] == world.picture(entity, attribute, split, int(number))
        assert Image.open(io.BytesIO(record["image"])).size == (84, 56)
        assert record["question"].decode() == "What is the capital of this country?"
        answers = tuple(answer.decode() for answer in record["answers"])
        assert answers == world.answers(entity, "capital")
        assert record["category"].decode() == world.category(entity, "capital")
        assert record["source"] == b"flags"


def test_splits_hold_the_right_categories_and_no_common_picture(builder):
    train, test = records(builder, "train"), records(builder, "test")
    count = collections.Counter(r["category"] for r in train)
    assert count == {b"known": 12, b"unknown": 9, b"unfamiliar": 6}
    count = collections.Counter(r["category"] for r in test)
    assert count == {b"known": 8, b"unknown": 6, b"unfamiliar": 4, b"never_shown": 6}
    pictures = [r["image"] for r in train + test]
    assert len(set(pictures)) == len(pictures)
    assert len({r["id"] for r in train + test}) == len(pictures)


def test_prepared_folder_needs_no_builder_code(builder):
    again = tfds.builder_from_directory(builder.data_dir)
    assert again.info.splits["test"].num_examples == 24
    assert "ODbL" in again.info.redistribution_info.license


def test_folder_is_named_after_the_config(builder, small, data_dir):
    assert small.digest in str(builder.data_dir)
    other = flags_builder(dataclasses.replace(small, split_seed=9), data_dir)
    assert other.data_dir != builder.data_dir


def test_two_builds_are_equal(builder, small, tmp_path):
    again = pipeline.prepare(DataConfig(data_dir=str(tmp_path)), small)
    assert records(again, "train") == records(builder, "train")


def test_no_pictures_is_refused(small, data_dir):
    with pytest.raises(ValueError, match="test_pictures must be at least 1, not 0"):
        flags_builder(dataclasses.replace(small, test_pictures=0), data_dir)


def test_two_processes_may_prepare_at_once_without_tensorflow(tmp_path):
    program = (
        "import sys\n"
        "from mmsr_jax.data import pipeline\n"
        "from mmsr_jax.data.flags.world import FlagsConfig\n"
        "small = FlagsConfig(2, 2, 1, 1, train_pictures=4, test_pictures=1)\n"
        f"config = pipeline.DataConfig(data_dir={str(tmp_path)!r})\n"
        "print(len(pipeline.read_all(config, small)), 'tensorflow' in sys.modules)\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].split()[-2:] for process in both] == [
        ["20", "False"]
    ] * 2
