"""What training changes: weights, optimiser state, step.

With LoRA the adapter alone is trained: `params` is the adapter's tree, and the frozen weights
beneath it (`base`) travel beside the state, never in it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmsr_jax.model import lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: dict  # what is trained: the tree of model.abstract, or only its adapter
    opt_state: optax.OptState
    step: jax.Array  # scalar int32, updates done


def whole(params: dict, base: dict | None) -> dict:
    """What the model runs on: the trained `params`, joined with the frozen `base` if any."""
    return params if base is None else lora.join(base, params)


def create(params, transform: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """A fresh state at step 0 around `params` (which it takes over, not copies).

    Raises:
      ValueError: weights in less than float32, which would lose most of what they learn.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            # In bfloat16 an update below 1/512 of its weight is rounded away: at a learning rate
            # of 2e-6 nearly all are.
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} is {leaf.dtype}, but "
                "weights are trained in float32: set model.param_dtype (or lora.param_dtype) to "
                "float32; they may be computed with in bfloat16 (model.dtype)"
            )
    shapes = jax.eval_shape(transform.init, params)
    if mesh is None:
        fresh = TrainState(params, jax.jit(transform.init)(params), jnp.zeros((), jnp.int32))
        # Committed to the device like every later state: otherwise the second step compiles anew.
        return jax.device_put(fresh, jax.local_devices()[0])
    # Zeros do not inherit a sharding inside jit: moments must be told where their weights lie.
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = optax.tree_utils.tree_map_params(
        transform,
        lambda _, p: p.sharding,
        shapes,
        params,
        transform_non_params=lambda _: everywhere,
    )
    opt_state = jax.jit(transform.init, out_shardings=shardings)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), everywhere))


def abstract(state: TrainState) -> TrainState:
    """Shapes and shardings of a state: the target of a restore."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def vacate(state: TrainState) -> TrainState:
    """As `abstract`, and gives the state's memory back: what is restored takes its place.

    Otherwise a run that just fits could be started, but not continued.
    """
    shapes = abstract(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return shapes
