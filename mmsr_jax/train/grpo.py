"""Group Relative Policy Optimisation: advantages and loss.

MMSearch-R1 (arXiv 2506.20670) section 3 and appendix B, DeepSeekMath (arXiv 2402.03300) eq. 3-4.
Where the original's code and paper differ, the config says which one is meant.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.train.batch import TrainBatch
from mmsr_jax.train.logprobs import token_logprobs
from mmsr_jax.train.optimizer import OptimizerConfig
from mmsr_jax.types import Ending


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The numbers of the loss, by their symbols in the paper."""

    clip_low: float = 0.2  # epsilon below 1
    clip_high: float = 0.2  # epsilon above 1
    kl_weight: float = 0.001  # beta, weight of the k3 estimate of KL(policy || reference)
    advantage_std: bool = True  # divide by the group's standard deviation (GRPO) or not (Dr.GRPO)
    aggregate: Literal["token", "sequence"] = "token"  # mean over all tokens, or of sequence means
    # Cap of the truncated importance weight min(exp(old - sampler), cap) of each token (Yao et al.
    # 2025, "Your efficient RL framework secretly brings you off-policy RL training"); 0: none.
    # `old` is the trainer's log-prob at the start of the step. Needed for tokens of older policies.
    sampler_correction: float = 0.0


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """The stage: how much is sampled and how it is learned from (paper: 512 x 8, lr 2e-6)."""

    steps: int = 100
    prompts: int = 16  # questions a step
    group_size: int = 8  # samples a question
    temperature: float = 1.0
    updates: int = 1  # optimiser steps a batch of rollouts is cut into; 1: exactly on-policy
    # Trajectories that ran into their token limit: learned from as they are, or left out of the
    # loss (a cut turn says little of the policy); either way their reward counts in their group.
    truncated: Literal["keep", "mask"] = "keep"
    save_trajectories: int = 8  # of each step, for the report
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        for name in ("prompts", "group_size", "updates"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"grpo.{name} is {value}, at least 1 needed")
        if self.updates > self.prompts:
            raise ValueError(
                f"grpo.updates is {self.updates}, but the groups of grpo.prompts {self.prompts} "
                "questions cannot be cut into more parts than there are"
            )
        if not self.temperature > 0:  # the trainer divides by it, and greedy samples are all alike
            raise ValueError(f"grpo.temperature is {self.temperature}, it must be above 0")


def counts(ending: Ending, config: GRPOConfig) -> bool:
    """Whether the tokens of a trajectory that ended so are in the loss."""
    return config.truncated == "keep" or ending is not Ending.TOKEN_LIMIT


def advantages(rewards: np.ndarray, *, divide_by_std: bool = True) -> np.ndarray:
    """(R - mean) / (std + 1e-6) within a group; std is the unbiased one (ddof 1).

    Args:
      rewards: [G] rewards of one group.

    Returns:
      [G] float32. A group of one keeps its reward (mean 0, std 1), as in the original.

    Example:
      advantages([1, 0, 0, 0]) -> [1.5, -0.5, -0.5, -0.5]
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or rewards.size == 0:
        raise ValueError(f"rewards of one group must be a non-empty list, got {rewards.shape}")
    if rewards.size == 1:
        return rewards.astype(np.float32)
    centred = rewards - rewards.mean()
    if divide_by_std:
        centred = centred / (rewards.std(ddof=1) + 1e-6)
    return centred.astype(np.float32)


def k3(logprobs, reference):
    """The low-variance estimate exp(d) - d - 1 with d = reference - logprobs, clamped twice.

    The clamps (+-20 on d, +-10 on the value) are those of verl's `low_var_kl`.
    """
    d = jnp.clip(reference - logprobs, -20.0, 20.0)
    return jnp.clip(jnp.exp(d) - d - 1.0, -10.0, 10.0)


def loss(
    params,
    reference,
    graph,
    batch: TrainBatch,
    config: LossConfig,
    temperature,
    reference_graph=None,
):
    """Sum over tokens of weight * (policy loss + kl_weight * KL), and measurements.

    The weights of a whole step sum to 1 (see assemble), so sums over micro-batches add up to
    the step's mean: how a step is cut into micro-batches does not change it.

    Args:
      reference: frozen params of the reference policy, or None when kl_weight is 0.
      reference_graph: what runs them, None for `graph`; with LoRA the graph without adapters runs
        the weights that the policy itself stands on.

    Returns:
      scalar float32, dict of scalar sums; `*_max` entries are maxima.
    """
    logprobs, entropy = token_logprobs(graph, params, batch.inputs, batch.targets, temperature)
    fixed = jax.lax.stop_gradient(logprobs)
    old = fixed if batch.old_logprobs is None else batch.old_logprobs
    ratio = jnp.exp(jnp.where(batch.weights > 0, logprobs - old, 0.0))
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    policy = jnp.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
    gap = jnp.where(batch.mask > 0, old - batch.sampler_logprobs, 0.0)
    if config.sampler_correction > 0:  # a constant: no gradient flows into `gap`
        policy = policy * jnp.minimum(jnp.exp(gap), config.sampler_correction)
    per_token = policy
    kl = jnp.zeros_like(policy)
    if config.kl_weight > 0:
        frozen = graph if reference_graph is None else reference_graph
        ref, _ = token_logprobs(frozen, reference, batch.inputs, batch.targets, temperature)
        kl = k3(logprobs, jax.lax.stop_gradient(ref))
        per_token = policy + config.kl_weight * kl
    weights = batch.weights
    total = (weights * per_token).sum()
    inside = batch.mask
    measured = {
        "loss": total,
        "policy_loss": (weights * policy).sum(),
        "kl": (weights * kl).sum(),
        "entropy": (weights * entropy).sum(),
        # Where the clip decides; a ratio outside, on the side that is not clipped, learns on.
        "clip_fraction": (
            weights * (-batch.advantages * clipped > -batch.advantages * ratio)
        ).sum(),
        "sampler_ratio": (weights * jnp.exp(gap)).sum(),
        "logprob_gap_mean": (weights * jnp.abs(gap)).sum(),
        "logprob_gap_max": (inside * jnp.abs(gap)).max(),
    }
    return total, jax.lax.stop_gradient(measured)
