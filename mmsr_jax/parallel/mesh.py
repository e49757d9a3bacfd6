"""The device mesh: `fsdp` splits rows and parameters, `tensor` splits heads, mlp and vocab."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 (one of them at the most) takes whatever devices remain."""

    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay `devices` (all of the program's, when None) out as a mesh with axes `AXES`.

    The axes are of type Auto: the compiler propagates shardings, and constraints steer it.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh sizes must be positive, at most one of them -1; got {config}")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        if len(devices) % known:
            raise ValueError(f"{len(devices)} devices do not divide by {known} of {config}")
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"{config} asks for {int(np.prod(sizes))} devices, there are {len(devices)}"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
