"""Supervised fine-tuning: weighted cross-entropy on the model's own tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from mmsr_jax.train.batch import TrainBatch
from mmsr_jax.train.logprobs import token_logprobs
from mmsr_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The stage: steps, and how many conversations of each kind a batch holds."""

    steps: int = 400
    # (kind of lesson, conversations of it a batch, weight of each in the loss)
    batch: tuple[tuple[str, int, float], ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)


def loss(params, graph, batch: TrainBatch):
    """Sum over tokens of weight * -log p(target), and measurements.

    Returns:
      scalar float32, dict of scalar sums.
    """
    logprobs, entropy = token_logprobs(graph, params, batch.inputs, batch.targets)
    total = -(batch.weights * logprobs).sum()
    measured = {
        "loss": total,
        "entropy": (batch.weights * entropy).sum(),
        "tokens": batch.mask.sum(),
        "nll_sum": -(batch.mask * logprobs).sum(),
    }
    return total, jax.lax.stop_gradient(jax.tree.map(jnp.asarray, measured))
