"""Compile for TPUs that are not there: the real compiler, told of a topology.

    mesh = topology_mesh("v5p:2x2x4", MeshConfig(fsdp=8, tensor=2))
    graph, shapes = qwen2_5_vl.abstract(config, mesh)
    print(compile_for(mesh, step, shapes, batch))

libtpu (`pip install "mmsr-jax[tpu]"`) brings the compiler and needs no TPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from mmsr_jax.parallel import flops
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program. Bytes are per chip."""

    device_kind: str  # as the compiler names it: "TPU v5 lite" is v5e, "TPU v5" v5p
    devices: int
    fits: bool
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int  # at the worst moment, beyond arguments and outputs
    alias_bytes: int  # of the outputs, those that live in donated arguments
    flops: float  # of one chip's share of the matrix products (see `flops.count`)
    collectives: dict[str, int]  # instructions by name; those in a loop's body count once
    seconds: float  # spent compiling
    error: str = ""  # the compiler's own words, when the program does not fit

    @property
    def bytes(self) -> int:
        """Bytes per chip in all."""
        outputs = self.output_bytes - self.alias_bytes
        return self.argument_bytes + outputs + self.temporary_bytes

    def __str__(self) -> str:
        head = f"{self.devices} x {self.device_kind}: "
        if not self.fits:
            return head + f"does not fit: {self.error}"
        return head + (
            f"{self.bytes / GIB:.2f} GiB a chip (arguments {self.argument_bytes / GIB:.2f}, "
            f"outputs {self.output_bytes / GIB:.2f}, temporary {self.temporary_bytes / GIB:.2f}), "
            f"{self.flops / 1e12:.1f} TFLOP a chip, compiled in {self.seconds:.0f} s"
        )


def shard_bytes(shapes) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""

    def held(leaf):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(held, jax.tree.leaves(shapes)))


def topology_mesh(topology: str, config: MeshConfig) -> Mesh:
    """The mesh that `config` makes of a TPU topology's chips, e.g. "v5e:2x4", "v5p:2x2x4".

    Its devices can be compiled for, not run on.

    Raises:
        ValueError: libtpu is not installed, it knows no such topology, or the mesh sizes do not
            multiply to its chips.
    """
    from jax.experimental import topologies

    if jax.default_backend() != "tpu":
        # Else libtpu asks a metadata server, which only a TPU host has, and waits.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu's errors are of several kinds
        if not has_libtpu():
            raise ValueError(
                f"compiling for {topology!r} needs libtpu, which is not installed: "
                'pip install "mmsr-jax[tpu]"'
            ) from error
        raise ValueError(f"no topology {topology!r}: {str(error).splitlines()[0]}") from error
    return make_mesh(config, devices)


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(mesh: Mesh, function: Callable, *shapes, donate: tuple[int, ...] = ()) -> Compiled:
    """Compile jit(function) for the devices of `mesh`.

    Args:
        mesh: from `topology_mesh`; leaves of `shapes` without a sharding are whole on each chip.
        function: of as many arguments as there are `shapes`.
        shapes: trees of ShapeDtypeStruct (or of arrays, of which only the shape counts).
        donate: arguments whose memory the outputs may take.

    Returns: the figures. A program that is too large is an answer too, with `fits` False and
        what the compiler says; other errors are raised.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(
            np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding or whole
        )

    traced = jax.jit(function, donate_argnums=donate).trace(*jax.tree.map(placed, shapes))
    known = {
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "flops": flops.count(traced.jaxpr) / mesh.size,
    }
    lowered = traced.lower()
    start = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = next(
            (line.strip() for line in str(error).splitlines() if "Used " in line),
            str(error).splitlines()[0],
        )
        zero = dict.fromkeys(("argument_bytes", "output_bytes", "temporary_bytes"), 0)
        return Compiled(
            **known, **zero, alias_bytes=0, fits=False, collectives={},
            seconds=time.monotonic() - start, error=words,
        )  # fmt: skip
    seconds = time.monotonic() - start
    memory = program.memory_analysis()
    return Compiled(
        **known,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=_collectives(program.as_text()),
        seconds=seconds,
    )


def _collectives(text: str) -> dict[str, int]:
    """How many instructions of each collective an HLO text holds."""
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: count for name, count in found.items() if count}
