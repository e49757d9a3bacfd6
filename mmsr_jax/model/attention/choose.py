"""Which implementation serves a case: the rule behind `ModelConfig.attention`.

| name | runs on | serves | source |
|---|---|---|---|
| `xla` | everywhere | everything; holds the [T, T] scores of a layer | `xla.attend` |
| `cudnn` | CUDA | bfloat16 and float16; rows of several sequences go to `triton` | jax.nn |
| `triton` | CUDA | everything, key-value heads repeated | pallas.ops.gpu.attention |
| `splash` | TPU | everything, heads padded to 128 | pallas.ops.tpu.splash_attention |

`auto` takes a kernel where one serves in half precision, else XLA.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax

from mmsr_jax.parallel.rules import Placement

# Groups of at most this many positions (the windows of the vision tower) are a batch of small
# products that a TPU kernel with blocks of 128 would only pad.
SHORT = 128
MOST_HEAD_DIM = 256  # beyond it the GPU kernels' tiles leave shared memory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Case:
    """All that the choice depends on."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: str  # of q, k and v
    head_dim: int
    length: int  # positions of a row or group
    causal: bool
    capability: str = ""  # of a GPU, such as "9.0"; "" where there is none


def platform_of(place: Placement) -> str:
    """The platform that a program laid out by `place` runs on.

    A mesh of devices says it itself, so that a program can be compiled for a machine elsewhere.
    """
    platform = _device(place).platform
    return "gpu" if platform == "cuda" else platform


def capability_of(place: Placement) -> str:
    """The compute capability of a GPU, "" of another device."""
    return str(getattr(_device(place), "compute_capability", ""))


def _device(place: Placement) -> jax.Device:
    devices = getattr(place.mesh, "devices", None)  # an abstract mesh has none
    return jax.devices()[0] if devices is None else devices.flat[0]


def _xla(case: Case) -> str | None:
    return None


def no_cuda(case) -> str | None:
    """Why a CUDA kernel cannot run where `case` (a `Case` or a `CachedCase`) runs; None: it can."""
    if case.platform != "gpu":
        return f"it runs on GPU, and this program is for {case.platform}"
    if case.capability.startswith("gfx"):
        return f"it is written for CUDA, this GPU is {case.capability}"
    if case.capability and float(case.capability) < 8:
        return f"it needs compute capability 8.0 (Ampere), this GPU has {case.capability}"
    return None


def _cudnn(case: Case) -> str | None:
    if reason := no_cuda(case):
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, the model's dtype is {case.dtype}"
    if case.head_dim % 8 or case.head_dim > 128:
        return f"heads must be a multiple of 8 up to 128 wide, they are {case.head_dim}"
    return None


def _triton(case: Case) -> str | None:
    if reason := no_cuda(case):
        return reason
    if case.head_dim > MOST_HEAD_DIM:
        return f"heads may be up to {MOST_HEAD_DIM} wide, they are {case.head_dim}"
    return None


def _splash(case: Case) -> str | None:
    if case.platform != "tpu":
        return f"it runs on TPU, and this program is for {case.platform}"
    return None


REFUSALS: dict[str, Callable[[Case], str | None]] = {
    "xla": _xla,
    "cudnn": _cudnn,
    "triton": _triton,
    "splash": _splash,
}


@functools.lru_cache(maxsize=1024)
def choose(wanted: str, case: Case) -> str:
    """The name of the implementation; each new choice is logged once.

    Args:
        wanted: "auto", or a name from `REFUSALS` that is then taken or refused, never replaced.

    Raises:
        ValueError: the implementation asked for cannot serve this case.
    """
    if wanted != "auto":
        reason = REFUSALS[wanted](case)
        if reason:
            raise ValueError(
                f"attention={wanted!r} cannot serve {case}: {reason}; "
                "take attention='auto' (or 'xla', which serves everything)"
            )
        name = wanted
    else:
        name = _auto(case)
    log.info("attention %s (asked for: %s) for %s", name, wanted, case)
    return name


def _auto(case: Case) -> str:
    # Whoever computes in float32 wants the exact numbers; kernels round products to less.
    if case.dtype == "float32":
        return "xla"
    if case.platform == "tpu" and case.length > SHORT:
        return "splash"
    if case.platform == "gpu":
        return next(name for name in ("cudnn", "triton", "xla") if not REFUSALS[name](case))
    return "xla"
