"""One step of a stage: conversations in, new state and measurements out.

The host cuts and packs, the device computes; the measurements come back in one copy at the end.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mmsr_jax.model.config import ModelConfig
from mmsr_jax.train import grpo, step
from mmsr_jax.train.assemble import PackConfig, Piece, assemble
from mmsr_jax.train.state import TrainState, whole
from mmsr_jax.types import Author, Trajectory


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What every update of a stage shares."""

    graph: object  # of the model, on the training mesh
    model: ModelConfig
    pack: PackConfig
    transform: object  # optax.GradientTransformation
    base: dict | None = None  # with LoRA: the frozen weights under the adapter in the state
    reference_graph: object | None = None  # of the KL reference, None: `graph`


def sft_update(fixed: Fixed, state: TrainState, pieces: Sequence[Piece]):
    """One optimiser step on demonstrations, each conversation with its own weight.

    Returns: the state, measurements (floats), and the number of micro-batches.
    """
    batches = assemble(pieces, fixed.model, fixed.pack, aggregate="token")
    grads, measured = step.zeros_like(state.params), None
    for batch in batches:
        grads, new = step.accumulate_sft(fixed.graph, state.params, grads, batch, fixed.base)
        measured = step.add(measured, new)
    state, update = step.apply(fixed.transform, state, grads)
    values = {name: float(v) for name, v in jax.device_get(measured | update).items()}
    values["token_loss"] = values.pop("nll_sum") / max(values["tokens"], 1.0)
    return state, values, len(batches)


def grpo_update(
    fixed: Fixed,
    config: grpo.GRPOConfig,
    state: TrainState,
    reference,
    groups: Sequence[tuple[Sequence[Trajectory], Sequence[float]]],
    *,
    version: int | None = None,
):
    """`config.updates` optimiser steps on groups of (trajectories, rewards).

    Args:
      reference: frozen params of the KL term, or None when its weight is 0.
      version: of the policy in `state`, in the count of `Tokens.versions`; with it the tokens' age
        is measured (`staleness_mean`, `staleness_max`), None where the sampler keeps no count.

    Returns: the state, measurements (floats), and the number of micro-batches.
    """
    temperature = np.float32(config.temperature)
    age = {} if version is None else staleness(groups, version)
    parts = []
    for chosen in np.array_split(np.arange(len(groups)), config.updates):
        pieces = []
        for trajectories, rewards in (groups[i] for i in chosen):
            signal = grpo.advantages(np.asarray(rewards), divide_by_std=config.loss.advantage_std)
            for t, a in zip(trajectories, signal, strict=True):
                # Left out by weight 0, not by absence: its log-prob gap is measured all the same.
                weight = float(grpo.counts(t.ending, config))
                name = f"example {t.example.id}, sample {t.sample}"
                pieces.append(Piece(t.tokens, float(a), weight, name))
        aggregate = config.loss.aggregate
        parts.append(assemble(pieces, fixed.model, fixed.pack, aggregate=aggregate))
    if config.updates > 1:  # the policy moves between updates: remember what it was
        now = whole(state.params, fixed.base)
        parts = [
            [step.with_old(fixed.graph, now, batch, temperature) for batch in batches]
            for batches in parts
        ]
    total = None
    for batches in parts:
        grads, measured = step.zeros_like(state.params), None
        for batch in batches:
            grads, new = step.accumulate_grpo(
                fixed.graph, state.params, reference, grads, batch, config.loss, temperature,
                fixed.base, fixed.reference_graph,
            )  # fmt: skip
            measured = step.add(measured, new)
        state, update = step.apply(fixed.transform, state, grads)
        total = step.add(total, measured | update)
    values = {
        name: float(v) / (1 if name.endswith("_max") else config.updates)
        for name, v in jax.device_get(total).items()
    }
    return state, values | age, sum(map(len, parts))


def staleness(groups, version: int) -> dict[str, float]:
    """How many updates ago the model's tokens were sampled, over all of them; 0 is on-policy.

    Raises:
      ValueError: a token of a policy that is still to come.
    """
    tokens = [t.tokens for trajectories, _ in groups for t in trajectories]
    sampled = np.concatenate([t.versions[t.authors == Author.MODEL] for t in tokens])
    if sampled.size and sampled.max() > version:
        raise ValueError(f"a token of version {sampled.max()}, the policy is only {version}")
    ages = version - sampled
    if not ages.size:
        return {"staleness_mean": 0.0, "staleness_max": 0.0}
    return {"staleness_mean": float(ages.mean()), "staleness_max": float(ages.max())}
