"""Whole updates: they learn, they repeat themselves, several of them clip, nothing recompiles."""

import dataclasses

import jax
import numpy as np
import pytest

from mmsr_jax.parallel import compiles
from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step, update
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.train.grpo import GRPOConfig, LossConfig, advantages
from mmsr_jax.train.update import Fixed, grpo_update, sft_update
from mmsr_jax.types import Author, Ending

CONFIG = GRPOConfig(loss=LossConfig(kl_weight=0.1), updates=1)


@pytest.fixture(scope="module")
def fixed(tiny):
    return Fixed(tiny.graph, tiny.model, tiny.pack, tiny.transform)


def fresh(tiny, fixed):
    return state_lib.create(tiny.params(), fixed.transform)


def test_sft_lowers_the_loss_of_what_it_learns(tiny, fixed, pieces):
    state, losses = fresh(tiny, fixed), []
    for _ in range(8):
        state, values, micro = sft_update(fixed, state, pieces)
        losses.append(values["loss"])
        assert values["skipped"] == 0 and micro == 1
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 8
    assert values["token_loss"] == pytest.approx(values["loss"], rel=0.5)


def scores(tiny, params, groups):
    """Mean log-prob of each conversation's own tokens."""
    out = []
    for trajectories, _ in groups:
        for t in trajectories:
            (batch,) = assemble([Piece(t.tokens)], tiny.model, tiny.pack, aggregate="token")
            logp = step.logprobs(tiny.graph, params, batch, np.float32(1))
            out.append(float((logp * batch.weights).sum()))
    return np.asarray(out)


def test_grpo_prefers_what_was_rewarded(tiny, fixed, groups):
    state, reference = fresh(tiny, fixed), tiny.params()
    before = scores(tiny, state.params, groups)
    for _ in range(4):
        state, values, _ = grpo_update(fixed, CONFIG, state, reference, groups)
    gain = scores(tiny, state.params, groups) - before
    assert gain[0] > max(gain[1:3]) and min(gain[3:5]) > gain[5]
    assert values["kl"] > 0 and np.isfinite(list(values.values())).all()


def test_groups_of_equal_rewards_teach_nothing(tiny, fixed, groups):
    even = [(trajectories, [0.5] * 3) for trajectories, _ in groups]
    _, values, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), tiny.params(), even)
    assert values["policy_loss"] == 0
    assert values["grad_norm"] < 1e-5  # of the KL term, whose slope at the reference is zero


def test_the_first_step_is_on_policy_and_at_the_reference(tiny, fixed, groups):
    _, values, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), tiny.params(), groups)
    assert values["kl"] == pytest.approx(0, abs=1e-9)
    assert values["clip_fraction"] == 0
    assert values["loss"] == pytest.approx(values["policy_loss"], abs=1e-7)


def test_several_updates_of_one_batch_remember_the_policy_that_sampled(tiny, fixed, groups):
    twice = dataclasses.replace(CONFIG, updates=2)
    state, values, micro = grpo_update(fixed, twice, fresh(tiny, fixed), tiny.params(), groups)
    assert int(state.step) == 2 and micro == 2
    assert values["clip_fraction"] > 0.1  # the second part is off-policy by then
    # The same two parts as steps of their own: each is on-policy, nothing is clipped.
    state = fresh(tiny, fixed)
    for group in groups:
        state, values, _ = grpo_update(fixed, CONFIG, state, tiny.params(), [group])
        assert values["clip_fraction"] == 0


def test_the_same_update_twice_is_the_same_bit_for_bit(tiny, fixed, groups):
    states = []
    for _ in range(2):
        state = fresh(tiny, fixed)
        for _ in range(2):
            state, _, _ = grpo_update(fixed, CONFIG, state, tiny.params(), groups)
        states.append(state)
    for left, right in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(left, right)


def test_nothing_compiles_once_every_program_has_run(tiny, fixed, groups, pieces):
    state, reference = fresh(tiny, fixed), tiny.params()
    twice = dataclasses.replace(CONFIG, updates=2)

    def everything(state, pieces, groups):
        state, _, _ = sft_update(fixed, state, pieces)
        state, _, _ = grpo_update(fixed, CONFIG, state, reference, groups)
        return grpo_update(fixed, twice, state, reference, groups)[0]

    state = everything(state, pieces, groups)
    before = compiles.count()
    state = everything(state, pieces[2:3], groups[::-1])
    many = [p for p in pieces for _ in range(3)]  # several micro-batches
    everything(state, many, [(t * 3, r * 3) for t, r in groups])
    assert compiles.count() == before


@pytest.fixture
def cut(groups):
    """The groups, two trajectories of the first at their token limit."""
    (first, rewards), second = groups
    ended = [dataclasses.replace(t, ending=Ending.TOKEN_LIMIT) for t in first[:2]]
    return [([*ended, first[2]], rewards), second]


def test_truncated_trajectories_are_left_out_of_the_loss_but_not_of_their_group(
    tiny, fixed, groups, cut, monkeypatch
):
    """The update is that of the others alone, with the advantages that all six give."""
    seen = []

    def watched(pieces, *rest, **fields):
        seen.extend(assemble(pieces, *rest, **fields))
        return seen[-1:]

    monkeypatch.setattr(update, "assemble", watched)
    config, reference = dataclasses.replace(CONFIG, truncated="mask"), tiny.params(1)
    state, values, _ = grpo_update(fixed, config, fresh(tiny, fixed), reference, cut)
    (batch,) = seen
    assert batch.weights.sum() == pytest.approx(1, abs=1e-6)
    signal = np.concatenate([advantages(np.asarray(r)) for _, r in groups])
    others = [t.tokens for trajectories, _ in groups for t in trajectories][2:]
    pieces = [Piece(t, float(a)) for t, a in zip(others, signal[2:], strict=True)]
    (alone,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    grads = step.zeros_like(tiny.params())
    grads, measured = step.accumulate_grpo(
        tiny.graph, tiny.params(), reference, grads, alone, CONFIG.loss, np.float32(1)
    )
    expected, _ = step.apply(tiny.transform, fresh(tiny, fixed), grads)
    assert values["loss"] == pytest.approx(float(measured["loss"]), rel=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-4)
    # Kept, they change the update.
    _, kept, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), reference, cut)
    assert abs(kept["loss"] - values["loss"]) > 1e-3


def test_a_step_of_truncated_trajectories_alone_teaches_nothing(tiny, fixed, groups):
    all_cut = [
        ([dataclasses.replace(t, ending=Ending.TOKEN_LIMIT) for t in trajectories], rewards)
        for trajectories, rewards in groups
    ]
    config = dataclasses.replace(CONFIG, truncated="mask")
    _, values, _ = grpo_update(fixed, config, fresh(tiny, fixed), tiny.params(1), all_cut)
    assert values["grad_norm"] == values["loss"] == 0
    assert values["logprob_gap_max"] > 0  # measured all the same
    _, values, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), tiny.params(1), all_cut)
    assert values["grad_norm"] > 0.01


def test_the_age_of_tokens_is_measured(tiny, fixed, groups, cut):
    def aged(trajectory, ages):
        """Sampled by policies `ages` updates older than version 9, a turn each in turn."""
        tokens = trajectory.tokens
        versions, own = tokens.versions.copy(), tokens.authors == Author.MODEL
        turns = np.cumsum(np.diff(own.astype(int), prepend=0) == 1)
        versions[own] = 9 - np.asarray(ages)[turns[own] - 1]
        return dataclasses.replace(
            trajectory, tokens=dataclasses.replace(tokens, versions=versions)
        )

    # Three turns of 9, 10 and 11 tokens; then one of 3, and two of 5 and 6.
    (a, b, c), rewards = groups[0]
    mixed = [([aged(a, [2, 1, 0]), aged(b, [0]), aged(c, [4, 0])], rewards)]
    found = update.staleness(mixed, 9)
    assert found["staleness_max"] == 4
    assert found["staleness_mean"] == pytest.approx((2 * 9 + 10 + 4 * 5) / (9 + 10 + 11 + 3 + 11))
    with pytest.raises(ValueError, match="token of version 9, the policy is only 8"):
        update.staleness(mixed, 8)
    _, values, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), tiny.params(), mixed, version=9)
    assert {name: values[name] for name in found} == found
    _, values, _ = grpo_update(fixed, CONFIG, fresh(tiny, fixed), tiny.params(), cut)
    assert not found.keys() & values.keys()


def test_old_log_probs_are_those_at_the_start_of_the_step(tiny, fixed, groups, monkeypatch):
    """Of every part of the batch, although the policy has moved when the second is learned."""
    seen = []
    accumulate = step.accumulate_grpo

    def watched(graph, params, reference, grads, batch, *rest):
        seen.append(batch)
        return accumulate(graph, params, reference, grads, batch, *rest)

    monkeypatch.setattr(step, "accumulate_grpo", watched)
    twice = dataclasses.replace(CONFIG, updates=2)
    state, _, _ = grpo_update(fixed, twice, fresh(tiny, fixed), tiny.params(), groups)
    assert len(seen) == 2
    for batch in seen:
        at_start = step.logprobs(tiny.graph, tiny.params(), batch, np.float32(1))
        np.testing.assert_array_equal(batch.old_logprobs, at_start)
    after = step.logprobs(tiny.graph, state.params, seen[1], np.float32(1))
    assert np.abs(seen[1].mask * (after - seen[1].old_logprobs)).max() > 0.05
