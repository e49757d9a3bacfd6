"""Ids that may never be sampled: not by the sampler, not in the trainer's log-probs."""

import dataclasses

import jax
import numpy as np
import pytest

from mmsr_jax.engine.engine import Engine
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.train import grpo, step
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.types import Author

SIZE = 416  # ids of the model; the tokenizer has fewer, the others are padding


@dataclasses.dataclass(frozen=True)
class Made:
    """The tiny model with a padded vocabulary, and weights that long for what is forbidden."""

    free: ModelConfig  # may say anything
    held: ModelConfig
    free_graph: object
    graph: object
    params: dict
    never: np.ndarray  # [V] bool

    def engine(self, config, free=False):
        graph, model = (self.free_graph, self.free) if free else (self.graph, self.held)
        out = Engine(graph, model, config, ())
        out.set_params(self.params)
        return out


@pytest.fixture(scope="module")
def made(tiny) -> Made:
    known = tiny.tokenizer.vocab_size
    # Ordinary words too, so that much of what these weights would say is forbidden.
    ids = tuple(sorted({*tiny.tokenizer.structural_ids, *range(100, 200)}))
    text = dataclasses.replace(tiny.model.text, vocab_size=SIZE)
    free = dataclasses.replace(tiny.model, text=text)
    held = dataclasses.replace(free, unsampled_ids=ids, sampled_vocab=known)
    never = np.zeros(SIZE, bool)
    never[list(ids)] = True
    never[known:] = True
    assert SIZE - known > 20 and tiny.tokenizer.image_pad in ids
    params = jax.tree.map(np.array, tiny.params())
    rows = 0.2 * np.random.default_rng(7).normal(size=(SIZE - known, text.hidden))
    table = np.concatenate([params["text"]["embed"]["table"][:known], rows.astype(np.float32)])
    table[never] *= 3  # logits as wide again
    params["text"]["embed"]["table"] = table
    graphs = [qwen.abstract(model)[0] for model in (free, held)]
    return Made(free, held, *graphs, jax.device_put(params, jax.devices()[0]), never)


def said(played):
    return np.concatenate([t.ids[t.authors == Author.MODEL] for t in played])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_they_are_never_drawn(tiny, made, plans, play, temperature):
    free = said(play(made.engine(tiny.engine_config, free=True), plans, temperature))
    assert made.never[free].mean() > 0.4  # what the weights would say
    held = said(play(made.engine(tiny.engine_config), plans, temperature))
    assert held.size == free.size
    assert not made.never[held].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probs_are_the_trainers_and_those_of_a_smaller_vocabulary(
    tiny, made, plans, play, temperature
):
    played = play(made.engine(tiny.engine_config), plans, temperature)
    batches = assemble([Piece(t) for t in played], made.held, tiny.pack, aggregate="token")
    compared = 0
    for batch in batches:
        trained = step.logprobs(made.graph, made.params, batch, np.float32(temperature))
        inside = batch.mask > 0
        np.testing.assert_allclose(
            np.asarray(trained)[inside], batch.sampler_logprobs[inside], rtol=0, atol=1e-5
        )
        raw = qwen.forward(made.free_graph, made.params, batch.inputs).logits
        raw = np.asarray(raw, np.float64)[inside] / temperature
        few = raw[:, ~made.never]
        few -= few.max(-1, keepdims=True)
        few -= np.log(np.exp(few).sum(-1, keepdims=True))
        place = np.cumsum(~made.never) - 1
        plain = few[np.arange(len(few)), place[batch.targets[inside]]]
        np.testing.assert_allclose(batch.sampler_logprobs[inside], plain, rtol=0, atol=1e-5)
        compared += inside.sum()
    assert compared == sum(sum(p.budgets) for p in plans)


def test_loss_and_gradient_are_finite_and_blind_to_them(tiny, made, plans, play):
    """Prompts hold ids that are never sampled; as targets of no weight they count for nothing."""
    played = play(made.engine(tiny.engine_config), plans)
    pieces = [Piece(t, advantage=a) for t, a in zip(played, (1, -1, 2, -2, 0.5), strict=True)]
    batch, *_ = assemble(pieces, made.held, tiny.pack, aggregate="token")
    assert made.never[batch.targets].any()
    config = grpo.LossConfig(kl_weight=0.1, sampler_correction=2.0)
    zeros = step.zeros_like(made.params)
    reference = jax.tree.map(lambda p: 0.9 * p, made.params)
    grads, values = step.accumulate_grpo(
        made.graph, made.params, reference, zeros, batch, config, np.float32(1)
    )
    tuned, sft = step.accumulate_sft(made.graph, made.params, step.zeros_like(made.params), batch)
    for leaf in jax.tree.leaves((grads, tuned, values, sft)):
        assert np.isfinite(leaf).all()
    assert values["kl"] > 0 and values["entropy"] < np.log((~made.never).sum())
    # Tied embedding: a row of the table gets a gradient as input, or as an id that can be said.
    table = np.abs(np.asarray(tuned["text"]["embed"]["table"])).max(-1)
    unseen = ~np.isin(np.arange(SIZE), batch.inputs.ids)
    assert (table[unseen & made.never] == 0).all() and (unseen & made.never).sum() > 50
    assert (table[unseen & ~made.never] > 0).all() and (unseen & ~made.never).sum() > 50


def test_raw_logits_stay_the_published_models(tiny, made):
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    raw = qwen.unembed(made.free_graph, made.params, hidden)
    np.testing.assert_array_equal(qwen.unembed(made.graph, made.params, hidden), raw)
    masked = np.asarray(qwen.token_logits(made.graph, made.params, hidden))
    assert (masked[..., made.never] == np.float32(qwen.NEVER)).all()
    np.testing.assert_array_equal(masked[..., ~made.never], raw[..., ~made.never])
    np.testing.assert_array_equal(qwen.token_logits(made.free_graph, made.params, hidden), raw)


def test_a_conversation_in_which_the_model_says_one_is_refused(tiny, made):
    tokens = tiny.conversation(("What?",), seed=1)
    ids = tokens.ids.copy()
    at = np.flatnonzero(tokens.authors == Author.MODEL)[2]
    fine = np.flatnonzero(~made.never)
    ids[tokens.authors == Author.MODEL] = fine[0]

    def pack(wrong, name="example e1, sample 3"):
        out = ids.copy()
        out[at] = wrong
        piece = Piece(dataclasses.replace(tokens, ids=out), name=name)
        return assemble([piece], made.held, tiny.pack, aggregate="token")

    assert len(pack(fine[1])) == 1
    with pytest.raises(ValueError, match="example e1, sample 3: the model says id 150, .* never"):
        pack(150)
    with pytest.raises(ValueError, match="conversation 0: the model says id 415, .* never"):
        pack(415, "")
    with pytest.raises(ValueError, match="id 416, which is outside the vocabulary of 416"):
        pack(416)
