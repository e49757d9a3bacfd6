"""The sampler computes what the trainer computes, whatever is cached, chunked, shared or beside."""

import dataclasses

import jax
import numpy as np
import pytest

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.train import step
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.types import Author


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_the_trainers(tiny, plans, play, temperature):
    """Issue 2 asks for 1e-4 a token."""
    params = tiny.params()
    played = play(tiny.engine(params), plans, temperature)
    assert max(len(t.pictures) for t in played) == 3
    spoken = [int((t.authors == Author.MODEL).sum()) for t in played]
    assert spoken == [sum(p.budgets) for p in plans]
    batches = assemble([Piece(t) for t in played], tiny.model, tiny.pack, aggregate="token")
    assert sum(b.mask.sum() for b in batches) == sum(spoken)
    assert max(b.inputs.segments.max() for b in batches) > 1  # packed
    for batch in batches:
        trained = step.logprobs(tiny.graph, params, batch, np.float32(temperature))
        gap = np.abs(trained - batch.sampler_logprobs) * batch.mask
        assert gap.max() < 1e-5, f"{gap.max():.2e}"


def recompute(tiny, params, tokens):
    """Greedy choice after every token of the conversation, by one pass without any cache each."""
    length = tiny.engine_config.slots
    vision = layout.vision_inputs(
        tokens.pictures, tiny.model.vision, patches=192, pictures_bucket=6, frame=64
    )

    @jax.jit
    def likeliest(params, inputs, at):
        return jax.lax.dynamic_index_in_dim(
            qwen.forward(tiny.graph, params, inputs).logits[0], at, keepdims=False
        ).argmax()

    features = sum(p.patches.shape[0] for p in tokens.pictures) // 4
    assert features <= 192 // 4
    for at in np.flatnonzero(tokens.authors == Author.MODEL):

        def padded(array, fill=0, at=at):
            out = np.full((*array.shape[:-1], length), fill, np.int32)
            out[..., :at] = array[..., :at]  # nothing of what follows is there
            return out

        inputs = qwen.Inputs(
            ids=padded(tokens.ids)[None],
            positions=padded(tokens.positions)[:, None],
            segments=padded(np.ones(len(tokens)))[None],
            image_index=padded(tokens.image_index, -1)[None],
            vision=vision,
        )
        yield int(likeliest(params, inputs, at - 1))


def test_greedy_decoding_equals_full_recomputation(tiny, plans, play):
    params = tiny.params(1)
    played = play(tiny.engine(params), plans, temperature=0.0)
    assert len({len(t) for t in played}) == len(plans)
    assert max(len(tiny.prompt(*p.first)) for p in plans) > tiny.engine_config.extend_tokens
    varied = 0
    for tokens in played:
        spoken = tokens.ids[tokens.authors == Author.MODEL].tolist()
        assert list(recompute(tiny, params, tokens)) == spoken
        varied += len(set(spoken))
    assert varied > 25  # not one word repeated


def test_samples_do_not_depend_on_the_other_rows(tiny, plans, play, same):
    engine = tiny.engine()
    together = play(engine, plans)
    for plan, tokens in zip(plans, together, strict=True):
        same(play(engine, [plan])[0], tokens)  # alone, in another row, over a used cache
    for left, right in zip(play(engine, plans[::-1])[::-1], together, strict=True):
        same(left, right)


@pytest.mark.parametrize("seed", range(4))
def test_samples_do_not_depend_on_when_tools_answer(tiny, plans, play, same, seed):
    engine = tiny.engine()
    late = play(engine, plans, arrival=np.random.default_rng(seed))
    for left, right in zip(late, play(engine, plans), strict=True):
        same(left, right)


def test_samples_do_not_depend_on_the_sizes_of_the_engine(tiny, plans, play, same):
    """Other shapes are other programs: equal up to rounding."""
    sizes = dataclasses.replace(
        tiny.engine_config, rows=7, slots=160, decode_steps=3, extend_rows=2, extend_tokens=32,
        patches=128,
    )  # fmt: skip
    other = play(tiny.engine(config=sizes), plans)
    for left, right in zip(other, play(tiny.engine(), plans), strict=True):
        same(left, right, tolerance=1e-5)


def test_other_streams_and_other_weights_sample_otherwise(tiny, plans, play):
    plan = plans[0]
    base = play(tiny.engine(), [plan])[0]
    renamed = dataclasses.replace(plan, key=("z",))
    assert (play(tiny.engine(), [renamed])[0].ids != base.ids).any()
    assert (play(tiny.engine(tiny.params(2)), [plan])[0].ids != base.ids).any()
