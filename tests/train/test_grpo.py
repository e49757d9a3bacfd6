"""Advantages and loss against numbers worked out by hand and against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.train import grpo, step
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.types import Author

ONE = np.float32(1)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),  # std of ddof 1 is 0.5; of ddof 0, 0.433
        ([1, 0], [np.sqrt(0.5), -np.sqrt(0.5)]),
        ([0.91, 0.91, 0.1, 0.1], [0.866025, 0.866025, -0.866025, -0.866025]),
        ([0.5, 0.5, 0.5], [0, 0, 0]),
        ([0.7], [0.7]),  # mean 0 and std 1 of a group of one, as in the original
    ],
)
def test_advantages(rewards, expected):
    found = grpo.advantages(np.asarray(rewards, np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_advantages_without_the_division():
    rewards = [1, 0.91, 0.1, 0]
    found = grpo.advantages(rewards, divide_by_std=False)
    np.testing.assert_allclose(found, np.asarray(rewards) - np.mean(rewards), rtol=1e-6)
    assert grpo.advantages([0.7], divide_by_std=False).tolist() == pytest.approx([0.7])


@pytest.mark.parametrize("rewards", [[], [[1.0, 0.0]], 1.0])
def test_advantages_need_one_group(rewards):
    with pytest.raises(ValueError, match="one group"):
        grpo.advantages(rewards)


def test_k3():
    logp = np.asarray([-1.0, -1.0, -3.0, -0.1, -1.0, -50.0, -1.0], np.float32)
    ref = np.asarray([-1.0, -2.0, -1.0, -1.5, -30.0, -1.0, -3.2], np.float32)
    d = np.clip(ref.astype(np.float64) - logp, -20, 20)
    expected = np.clip(np.exp(d) - d - 1, -10, 10)
    np.testing.assert_allclose(grpo.k3(logp, ref), expected, rtol=1e-5, atol=1e-6)
    assert expected[5] == 10 and expected[4] == 10 and expected[0] == 0  # both clamps, no distance
    # Gradient: 1 - exp(ref - logp), and none where it is clamped.
    slope = jax.grad(lambda x: grpo.k3(x, ref).sum())(jnp.asarray(logp))
    inside = np.asarray([1, 1, 1, 1, 0, 0, 1])
    np.testing.assert_allclose(slope, inside * (1 - np.exp(d)), rtol=1e-5, atol=1e-6)


def entries(values):
    return jnp.asarray(values, jnp.float32)[None]


def measured(
    monkeypatch, config, *, logp, advantages, old=None, sampler=None, ref=None, mask=None,
    weights=None,
):  # fmt: skip
    """`grpo.loss` with log-probs given instead of a model's; the gradient is over them."""
    count = len(logp)
    given = {"policy": entries(logp), "reference": None if ref is None else entries(ref)}
    monkeypatch.setattr(
        grpo,
        "token_logprobs",
        lambda graph, params, inputs, targets, temperature: (params, jnp.ones_like(params)),
    )
    mask = np.ones(count) if mask is None else np.asarray(mask)
    batch = grpo.TrainBatch(
        inputs=None,
        targets=None,
        mask=entries(mask),
        weights=entries(mask / mask.sum() if weights is None else weights),
        advantages=entries(advantages),
        sampler_logprobs=entries(logp if sampler is None else sampler),
        old_logprobs=None if old is None else entries(old),
    )
    (total, values), slope = jax.value_and_grad(
        lambda p: grpo.loss(p, given["reference"], None, batch, config, ONE), has_aux=True
    )(given["policy"])
    assert float(values["loss"]) == pytest.approx(float(total))
    return {k: float(v) for k, v in values.items()}, np.asarray(slope[0])


def test_clipping_by_hand(monkeypatch):
    """Four tokens, ratios 1.5, 1.5, 0.5, 0.5, advantages of both signs, no KL."""
    ratios, advantages = np.asarray([1.5, 1.5, 0.5, 0.5]), [2.0, -2.0, 2.0, -2.0]
    old = np.full(4, -1.0)
    values, slope = measured(
        monkeypatch, grpo.LossConfig(kl_weight=0.0),
        logp=old + np.log(ratios), old=old, advantages=advantages,
    )  # fmt: skip
    # max(-A r, -A clip(r)): -2*1.2, 2*1.5, -2*0.5, 2*0.8
    assert values["policy_loss"] == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6) / 4, rel=1e-5)
    # Gradient -A r where the unclipped term is the larger, else none.
    np.testing.assert_allclose(slope, np.asarray([0, 3.0, -1.0, 0]) / 4, rtol=1e-5)
    # Every ratio is outside, but the clip only holds back two: as TRL and verl count.
    assert values["clip_fraction"] == pytest.approx(0.5)
    assert values["kl"] == 0


def test_clip_high_and_low_are_two_numbers(monkeypatch):
    config = grpo.LossConfig(kl_weight=0.0, clip_low=0.1, clip_high=0.3)
    old = np.full(2, -1.0)
    values, _ = measured(
        monkeypatch, config, logp=old + np.log([1.5, 0.5]), old=old, advantages=[1.0, -1.0]
    )
    assert values["policy_loss"] == pytest.approx((-1.3 + 0.9) / 2, rel=1e-5)


def test_on_policy_the_gradient_is_that_of_the_log_prob(monkeypatch):
    """Ratio 1: loss -A, gradient -A d(logp), nothing clipped, whatever the sampler said."""
    advantages = np.asarray([1.5, -0.5, 0.0])
    values, slope = measured(
        monkeypatch, grpo.LossConfig(kl_weight=0.0), logp=[-1.0, -2.0, -3.0],
        sampler=[-1.1, -2.0, -2.9], advantages=advantages,
    )  # fmt: skip
    assert values["policy_loss"] == pytest.approx(-advantages.mean())
    np.testing.assert_allclose(slope, -advantages / 3, rtol=1e-6)
    assert values["clip_fraction"] == 0
    assert values["logprob_gap_max"] == pytest.approx(0.1, rel=1e-4)
    assert values["logprob_gap_mean"] == pytest.approx(0.2 / 3, rel=1e-4)
    assert values["sampler_ratio"] == pytest.approx((np.exp(0.1) + 1 + np.exp(-0.1)) / 3, rel=1e-5)


def test_the_samplers_correction_is_truncated(monkeypatch):
    config = grpo.LossConfig(kl_weight=0.0, sampler_correction=2.0)
    logp = np.asarray([-1.0, -1.0])
    values, slope = measured(
        monkeypatch, config, logp=logp, sampler=logp - np.log([3.0, 0.5]), advantages=[1.0, 1.0]
    )
    np.testing.assert_allclose(slope, [-2.0 / 2, -0.5 / 2], rtol=1e-5)
    assert values["policy_loss"] == pytest.approx(-(2.0 + 0.5) / 2, rel=1e-5)


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_samplers_correction_equals_plain_numpy(monkeypatch, on_policy):
    """Loss and gradient: clipped surrogate times min(exp(old - sampler), cap), a constant."""
    rng = np.random.default_rng(3)
    logp, ref = -1 - rng.random(40), -1 - rng.random(40)
    old = logp if on_policy else logp + 0.3 * rng.normal(size=40)
    sampler = old - rng.normal(size=40)
    signal, cap, beta = rng.normal(size=40), 1.5, 0.1
    config = grpo.LossConfig(kl_weight=beta, sampler_correction=cap)
    values, slope = measured(
        monkeypatch, config, logp=logp, old=None if on_policy else old, ref=ref,
        sampler=sampler, advantages=signal,
    )  # fmt: skip
    ratio, weight = np.exp(logp - old), np.minimum(np.exp(old - sampler), cap)
    assert 5 < (weight == cap).sum() < 35
    clipped = np.clip(ratio, 0.8, 1.2)
    policy = weight * -np.minimum(ratio * signal, clipped * signal)
    kl = np.exp(ref - logp) - (ref - logp) - 1  # not weighted, as in verl
    assert values["loss"] == pytest.approx((policy + beta * kl).mean(), rel=1e-5)
    assert values["sampler_ratio"] == pytest.approx(np.exp(old - sampler).mean(), rel=1e-5)
    inside = (ratio * signal <= clipped * signal) | (ratio == clipped)
    assert on_policy or 5 < inside.sum() < 35
    expected = -weight * signal * ratio * inside + beta * (1 - np.exp(ref - logp))
    np.testing.assert_allclose(slope, expected / 40, rtol=1e-4, atol=1e-6)


def test_masked_tokens_count_for_nothing(monkeypatch):
    wild = [-1.0, -90.0, -2.0, 0.0]
    config, mask = grpo.LossConfig(kl_weight=0.5), [1, 0, 1, 0]
    values, slope = measured(
        monkeypatch, config, logp=wild, old=[-1.2, -1.0, -2.0, -99.0], ref=[-1.5, 0.0, -2.5, -50.0],
        sampler=[-1.2, 0.0, -2.0, 0.0], advantages=[1.0, 9.0, -1.0, 9.0], mask=mask,
    )  # fmt: skip
    assert slope[1] == slope[3] == 0 and np.isfinite(slope).all()
    few, kept = measured(
        monkeypatch, config, logp=[-1.0, -2.0], old=[-1.2, -2.0], ref=[-1.5, -2.5],
        sampler=[-1.2, -2.0], advantages=[1.0, -1.0],
    )  # fmt: skip
    assert values == pytest.approx(few, rel=1e-6)
    np.testing.assert_allclose(slope[[0, 2]], kept, rtol=1e-6)


def test_what_is_left_out_of_the_loss_cannot_spoil_it(monkeypatch):
    """A trajectory of weight 0 whose ratio is beyond float32: 0 * inf would be no number."""

    def given(old):
        values, slope = measured(
            monkeypatch, grpo.LossConfig(kl_weight=0.1), logp=[-1.0, -1.0], old=[-1.1, old],
            ref=[-1.0, -1.0], advantages=[1.0, -1.0], weights=[1, 0],
        )  # fmt: skip
        return values["loss"], slope.tolist()

    assert given(-200.0) == given(-1.0)
    assert np.isfinite(given(-200.0)[0])


def plain(logp, old, ref, advantages, mask, beta, low, high):
    """The loss as TRL writes it (loss_type "bnpo": one mean over all completion tokens)."""
    coef = np.exp(logp - old)
    clipped = np.clip(coef, 1 - low, 1 + high)
    per_token = -np.minimum(coef * advantages, clipped * advantages)
    per_token = per_token + beta * (np.exp(ref - logp) - (ref - logp) - 1)
    return (per_token * mask).sum() / mask.sum()


@pytest.fixture(scope="module")
def scored(tiny, params, pieces, alone):
    """The loss of one step by the program and the pieces' log-probs under three policies."""

    def near(seed):  # far enough to be clipped, too near for the clamps of KL
        return jax.tree.map(lambda a, b: a + 0.1 * (b - a), params, tiny.params(seed))

    reference, former = near(1), near(2)
    config = grpo.LossConfig(kl_weight=0.1)
    even = [dataclasses.replace(p, weight=1.0) for p in pieces]
    (batch,) = assemble(even, tiny.model, tiny.pack, aggregate="token")
    batch = step.with_old(tiny.graph, former, batch, ONE)
    grads, values = step.accumulate_grpo(
        tiny.graph, params, reference, step.zeros_like(params), batch, config, ONE
    )
    policies = [
        [alone(policy, p.tokens)[0] for p in even] for policy in (params, former, reference)
    ]
    return config, even, grads, values, policies


def test_loss_of_the_program_equals_plain_numpy(scored):
    config, even, _, values, (logp, old, ref) = scored
    advantages = np.concatenate([np.full(len(p.tokens), p.advantage) for p in even])
    mask = np.concatenate([p.tokens.authors == Author.MODEL for p in even])
    flat = [np.concatenate(x) for x in (logp, old, ref)]
    expected = plain(*flat, advantages, mask, config.kl_weight, config.clip_low, config.clip_high)
    assert float(values["loss"]) == pytest.approx(expected, rel=1e-4)
    d = (flat[2] - flat[0])[mask]
    assert np.abs(d).max() < 2
    assert float(values["kl"]) == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-4)
    ratio, signs = np.exp(flat[0] - flat[1])[mask], advantages[mask]
    # As TRL writes it: is_low_clipped | is_high_clipped.
    held = ((ratio < 1 - config.clip_low) & (signs < 0)) | (
        (ratio > 1 + config.clip_high) & (signs > 0)
    )
    assert 0.1 < held.mean() < 0.9
    assert float(values["clip_fraction"]) == pytest.approx(held.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"temperature": 0.0}, "grpo.temperature is 0.0"),
        ({"temperature": float("nan")}, "grpo.temperature is nan"),
        ({"prompts": 2, "updates": 4}, "grpo.updates is 4.* grpo.prompts 2"),
        ({"updates": 0}, "grpo.updates is 0"),
        ({"group_size": 0}, "grpo.group_size is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(values, why):
    with pytest.raises(ValueError, match=why):
        grpo.GRPOConfig(**values)


def test_entropy_is_the_policys_own(params, alone, scored):
    _, even, _, values, _ = scored
    found = []
    for piece in even:
        _, everything = alone(params, piece.tokens)
        own = piece.tokens.authors[1:] == Author.MODEL
        found.append(-(np.exp(everything) * everything).sum(-1)[own])
    assert float(values["entropy"]) == pytest.approx(np.concatenate(found).mean(), rel=1e-5)


def test_on_policy_gradient_of_the_model_is_that_of_weighted_log_probs(
    tiny, params, pieces, close_trees
):
    """On-policy and at its reference, GRPO is SFT with advantages for weights."""
    config = grpo.LossConfig(kl_weight=0.1)
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    grads, values = step.accumulate_grpo(
        tiny.graph, params, params, step.zeros_like(params), batch, config, ONE
    )
    weighted = dataclasses.replace(batch, weights=batch.weights * batch.advantages)
    expected, _ = step.accumulate_sft(tiny.graph, params, step.zeros_like(params), weighted)
    close_trees(grads, expected, 2e-5)
    assert float(values["loss"]) == pytest.approx(-float(weighted.weights.sum()), abs=1e-6)
    assert float(values["sampler_ratio"]) > 0


def test_temperature_scales_the_logits(tiny, params, alone):
    tokens = tiny.conversation(("What?",), seed=3)
    (batch,) = assemble([Piece(tokens)], tiny.model, tiny.pack, aggregate="token")
    found = step.logprobs(tiny.graph, params, batch, np.float32(0.5))[0, : len(tokens) - 1]
    _, logp = alone(params, tokens)
    sharp = 2 * logp - np.log(np.exp(2 * logp).sum(-1, keepdims=True))
    expected = sharp[np.arange(len(sharp)), tokens.ids[1:]]
    np.testing.assert_allclose(found, expected, atol=2e-5)
