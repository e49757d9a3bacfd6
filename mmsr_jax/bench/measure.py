"""Times of functions side by side, and what the machine can do at best."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

PAUSE = 0.02  # seconds between two runs: threads that still spin for the last one go to sleep


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall times of one function."""

    seconds: tuple[float, ...]  # in the order of the runs

    @property
    def best(self) -> float:
        """Seconds of the fastest run: the one that was disturbed least."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self, per: int = 1) -> dict[str, float]:
        """As JSON; times are divided by `per`, the things that one run does."""
        return {
            "min_ms": 1e3 * self.best / per,
            "median_ms": 1e3 * self.median / per,
            "runs": len(self.seconds),
        }


def interleave(functions: Mapping[str, Callable[[], object]], runs: int) -> dict[str, Times]:
    """Runs a, b, a, b, ...: whatever else happens on the machine happens to both.

    Each function returns when its work is done. One run of each, unmeasured, goes before.

    Raises:
        ValueError: no runs.
    """
    if runs < 1:
        raise ValueError(f"at least one run is needed to measure, not {runs}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(runs + 1):
        for name, function in functions.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this device does at best, measured with plain programs in this process."""

    flops: float  # a second, of one large matrix product in the compute dtype
    bandwidth: float  # bytes a second, the better of a copy and a matrix-vector product


def limits(dtype: str, *, matrix: int | None = None, megabytes: int | None = None) -> Limits:
    """Measures both.

    Args:
        dtype: of the matrices.
        matrix: side of the matrices; megabytes: what is read in one run. They default to sizes
            that fill the device and do not fit its caches.
    """
    on_cpu = jax.default_backend() == "cpu"
    side = matrix or (2048 if on_cpu else 8192)
    count = (megabytes or (256 if on_cpu else 4096)) * 10**6 // jnp.dtype(dtype).itemsize
    a = jnp.ones((side, side), dtype)
    table = jnp.ones((count // 4096, 4096), dtype)
    vector = jnp.ones((4096,), dtype)
    product = jax.jit(lambda a: a @ a)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    read = jax.jit(lambda table, vector: table @ vector)
    times = interleave(
        {
            "product": lambda: product(a).block_until_ready(),
            "copy": lambda: copy(table).block_until_ready(),
            "read": lambda: read(table, vector).block_until_ready(),
        },
        runs=5,
    )
    return Limits(
        flops=2 * side**3 / times["product"].best,
        bandwidth=max(2 * table.nbytes / times["copy"].best, table.nbytes / times["read"].best),
    )
