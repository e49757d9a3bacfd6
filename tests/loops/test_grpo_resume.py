"""GRPO in two parts: each step has its own price of searching, and memory holds one state."""

import dataclasses
import gc

import jax
import pytest

from mmsr_jax.build import Job
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import grpo
from mmsr_jax.weights.checkpoint import Checkpoints


@pytest.fixture
def three_steps(small):
    replace = dataclasses.replace
    return replace(
        small,
        stages=("grpo",),
        reward=replace(small.reward, search_penalty=0.1, warmup_steps=2),
        grpo=replace(small.grpo, steps=3, prompts=1, group_size=2),
        checkpoint=replace(small.checkpoint, every=1),
    )


def test_a_continued_run_pays_by_its_own_steps_and_holds_one_state(
    three_steps, tmp_path, monkeypatch
):
    prices, held = [], []
    score, restore = grpo.score, Checkpoints.restore
    table = three_steps.model.text.vocab_size, three_steps.model.text.hidden

    def tables():
        """Copies of the largest leaf: weights, reference, two moments, the engine's weights."""
        gc.collect()
        return sum(leaf.shape == table for leaf in jax.live_arrays())

    def watched_score(responses, answers, config):
        prices.append(config.search_penalty)
        return score(responses, answers, config)

    def watched_restore(self, abstract, step=None):
        held.append(tables() - before)
        return restore(self, abstract, step)

    monkeypatch.setattr(grpo, "score", watched_score)
    monkeypatch.setattr(Checkpoints, "restore", watched_restore)
    for steps in (1, 3):
        config = dataclasses.replace(three_steps.grpo, steps=steps)
        job = Job(dataclasses.replace(three_steps, grpo=config), tmp_path)
        before = tables()
        start = job.start()
        try:
            with RunLog(tmp_path, tensorboard=False) as log:
                params = grpo.run(job, log, start)
        finally:
            job.close()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
        del job, params
    assert prices == pytest.approx([-0.1] * 2 + [0.0] * 2 + [0.1] * 2)
    assert held == [1]  # the reference: what the fresh state held is free again
