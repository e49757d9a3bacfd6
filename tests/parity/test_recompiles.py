"""Fifty random batches of pictures and lengths need no more programs than there are buckets."""

import jax
import numpy as np
import pytest
import random_talks

from mmsr_jax.engine.engine import Engine, EngineConfig
from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.inputs import layout
from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.inputs.pad import ladder
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.parallel import compiles
from mmsr_jax.train import step
from mmsr_jax.train.assemble import PackConfig, Piece, assemble

BATCHES = 50


@pytest.fixture(scope="module")
def batches(tiny):
    """Conversations of 0 to 4 pictures each, four a batch."""
    images = ImageConfig(min_pixels=28 * 28, max_pixels=20 * 28 * 28)
    found = [random_talks.draw(seed, tiny.tokenizer, images) for seed in range(BATCHES)]
    talks = [talk for batch in found for talk in batch]
    assert len({len(talk.tokens) for talk in talks}) > 50
    assert len({p.grid for talk in talks for p in talk.tokens.pictures}) > 30
    return found


def test_training_compiles_one_program(tiny, batches):
    """The packer has one bucket. Learned conversations differ in number, length and pictures."""
    pack = PackConfig(rows=3, length=192, patches=480, pictures=9, picture_patches=80)
    params = tiny.params()
    grads = step.zeros_like(params)
    before, passes = compiles.count(), 0
    for talks in batches:
        pieces = [Piece(talk.tokens) for talk in talks]
        for micro in assemble(pieces, tiny.model, pack, aggregate="sequence"):
            grads, _ = step.accumulate_sft(tiny.graph, params, grads, micro)
            passes += 1
    assert passes > BATCHES
    assert compiles.count() - before == 1


def test_the_engine_compiles_a_program_for_each_thing_it_does(tiny, batches):
    """Encode, extend, copy pages, decode: one bucket each, whatever comes in."""
    config = EngineConfig(
        rows=8, slots=320, turn_tokens=5, decode_steps=3, extend_rows=3, extend_tokens=40,
        patches=160, pictures=5, picture_patches=80, feature_rows=1000,
    )  # fmt: skip
    engine = Engine(tiny.graph, tiny.model, config, ())
    engine.set_params(tiny.params())
    rng = np.random.default_rng(0)
    before = compiles.count()
    for batch in batches:
        talks = batch[: rng.integers(1, 5)]
        streams = [tuple(map(stream, range(rng.integers(1, 3)))) for _ in talks]
        groups = [
            engine.submit(Request(t.tokens, s, 5)) for t, s in zip(talks, streams, strict=True)
        ]
        said = {}
        while engine.busy:
            said |= {turn.number: turn.ids for turn in engine.step(1.0)}
        for talk, (number, *_) in zip(talks, groups, strict=True):
            reply, whole = random_talks.go_on(talk, said[number], tiny.tokenizer)
            engine.resume(Resume(number, reply, whole.pictures, 2))
        while engine.busy:
            engine.step(0.0)
        for number in sum(groups, ()):
            engine.release(number)
    assert engine.counters["prefill_tokens"] > 50 * BATCHES
    assert compiles.count() - before == 4


def test_the_tower_is_traced_once_a_bucket(tiny, batches):
    """Without sizes given, pictures go to steps of ladders; only these are shapes."""
    traced, buckets = [], set()

    @jax.jit
    def encode(params, vision):
        traced.append(vision.patches.shape)
        return qwen2_5_vl.encode_images(tiny.graph, params, vision)

    params = tiny.abstract[1]
    for talks in batches:
        pictures = [picture for talk in talks for picture in talk.tokens.pictures]
        sizes = [len(picture.patches) for picture in pictures]
        buckets.add((ladder(sum(sizes)), ladder(len(sizes), 4, multiple=4), ladder(max(sizes), 16)))
        vision = layout.vision_inputs(pictures, tiny.model.vision)
        encode.eval_shape(params, vision)
    assert 1 < len(traced) <= len(buckets) < BATCHES // 2
