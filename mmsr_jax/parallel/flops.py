"""How much arithmetic a function asks for, counted from its own program (jaxpr).

XLA's count takes the body of a loop once and a kernel for nothing, and here nearly all work is in
the loop over layers and in kernels.
"""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Floating point operations of all matrix products (2 a multiply-add), over all devices.

    Loops count as often as they turn, a branch as its dearest arm, kernels by their grid, and
    what `shard_map` gives to every device as often as there are devices. A loop whose length is
    data counts once, and a causal kernel counts the blocks that it skips. Operations on single
    numbers are left out: on an accelerator products outweigh them by far.

    Args:
        jaxpr: of a traced function, such as `jax.jit(f).trace(*shapes).jaxpr`. Of a gradient it
            holds the backward pass too, and what is computed again for it.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return float(sum(_equation(equation) for equation in inner.eqns))


def _equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    parts = [part for value in params.values() for part in _programs(value)]
    return _turns(name, params) * sum(count(part) for part in parts)


def _turns(name: str, params) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if name == "shard_map":
        return params["mesh"].size
    return 1


def _programs(value) -> list:
    """The programs within a parameter of an equation."""
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [part for one in value for part in _programs(one)]
    return []


def of(function, *shapes) -> float:
    """`count` of a function of arguments like `shapes` (arrays or ShapeDtypeStructs)."""
    return count(jax.jit(function).trace(*shapes).jaxpr)
