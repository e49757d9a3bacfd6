"""The jitted update: gradients of micro-batches are added up, then applied once.

Two programs a stage, whatever the number of micro-batches: `accumulate` and `apply`.
With LoRA `params` is the adapter and `base` the frozen weights beneath: gradients, optimiser state
and what is donated are the adapter's alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from mmsr_jax.train import grpo, sft
from mmsr_jax.train.batch import TrainBatch
from mmsr_jax.train.logprobs import token_logprobs
from mmsr_jax.train.state import TrainState, whole


def zeros_like(params):
    """An empty gradient accumulator, laid out like the weights."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32, device=p.sharding), params)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def accumulate_sft(graph, params, grads, batch: TrainBatch, base=None):
    """grads + gradient of the SFT loss on one micro-batch, and its measurements."""

    def loss(params):
        return sft.loss(whole(params, base), graph, batch)

    (_, measured), new = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), measured


@functools.partial(jax.jit, static_argnums=(0, 5, 8), donate_argnums=(3,))
def accumulate_grpo(
    graph,
    params,
    reference,
    grads,
    batch: TrainBatch,
    config: grpo.LossConfig,
    temperature,
    base=None,
    reference_graph=None,
):
    """grads + gradient of the GRPO loss on one micro-batch, and its measurements."""

    def loss(params):
        return grpo.loss(
            whole(params, base), reference, graph, batch, config, temperature, reference_graph
        )

    (_, measured), new = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), measured


@functools.partial(jax.jit, static_argnums=(0,))
def logprobs(graph, params, batch: TrainBatch, temperature):
    """[B, T] log-probs of the batch's targets: the old policy's, before several updates."""
    return token_logprobs(graph, params, batch.inputs, batch.targets, temperature)[0]


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def apply(transform: optax.GradientTransformation, state: TrainState, grads):
    """One optimiser step. A gradient that is not finite changes neither weights nor moments.

    The clock of the learning rate goes on even so: the rate is that of the step's number, and a
    schedule ends with its stage.

    Returns: the new state and {"grad_norm", "skipped"}.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    safe = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads)
    updates, opt_state = transform.update(safe, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def is_clock(part):
        return isinstance(part, optax.ScaleByScheduleState)

    def keep(new, old):
        return jax.tree.map(
            lambda n, o: n if is_clock(n) else jnp.where(finite, n, o), new, old, is_leaf=is_clock
        )

    new = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
    )
    return new, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}


def add(total: dict | None, measured: dict) -> dict:
    """Joins the measurements of two micro-batches: sums, and maxima where the name says so.

    Stays on the device; the loop fetches the result once a step.
    """
    if total is None:
        return measured
    return {
        name: jnp.maximum(total[name], value) if name.endswith("_max") else total[name] + value
        for name, value in measured.items()
    }


def with_old(graph, params, batch: TrainBatch, temperature) -> TrainBatch:
    """The batch with the log-probs that `params` give it now: the old policy of later updates.

    `params` are all weights, the frozen ones included.
    """
    return dataclasses.replace(batch, old_logprobs=logprobs(graph, params, batch, temperature))
