"""Optimiser and learning-rate schedules as configuration."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a clipped gradient norm.

    `sigmoid_decay` is the schedule of MMSearch-R1's code (`get_sigmoid_decay_schedule`):
    lr(t) = lr0 * (rho / (1 + exp((t - W) / (0.1 W))) + 1 - rho), with W = `decay_midpoint` and
    rho = `decay_ratio`. The original calls it a warm-up; it is a decay. Every schedule here counts
    updates; the original counts steps, which are fewer when `grpo.updates` is above 1.
    """

    learning_rate: float = 1e-4  # lr0
    schedule: Literal["constant", "linear", "cosine", "sigmoid_decay"] = "constant"
    warmup_steps: int = 0  # linear from 0, before any schedule
    final_ratio: float = 0.0  # linear and cosine end at final_ratio * lr0
    decay_midpoint: int = 45  # W
    decay_ratio: float = 0.95  # rho
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices only
    max_grad_norm: float = 1.0


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) to learning rate, for a stage of `steps` updates.

    Raises:
      ValueError: a schedule that is not defined for these numbers.
    """
    lr, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(lr)
    elif config.schedule == "linear":
        after = optax.linear_schedule(lr, lr * config.final_ratio, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, rest, config.final_ratio)
    else:
        after = sigmoid_decay(lr, config.decay_midpoint, config.decay_ratio)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])


def sigmoid_decay(lr: float, midpoint: int, ratio: float) -> optax.Schedule:
    """MMSearch-R1's schedule; see OptimizerConfig."""
    if midpoint <= 0:
        raise ValueError(f"sigmoid_decay needs decay_midpoint > 0, got {midpoint}")

    def at(step):
        gate = 1.0 / (1.0 + jnp.exp((step - midpoint) / (0.1 * midpoint)))
        return lr * (ratio * gate + 1.0 - ratio)

    return at


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, AdamW, schedule. Vectors (norms, biases) are not decayed."""

    def decayed(params):
        # By name: norms and biases of stacked layers have more than one axis, too.
        def matrix(path, _):
            return path[-1].key in ("kernel", "table", "lora_a", "lora_b")

        return jax.tree_util.tree_map_with_path(matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
