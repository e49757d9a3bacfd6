"""From logical axes to mesh axes: one table for training, one for rollouts.

Arrays are annotated by what their axes mean ("batch", "heads", ...). A table says which mesh axis
each meaning is split over. Within one array a mesh axis is used once, by the first axis that asks
for it: that is why `embed` may name `fsdp` for parameters while activations, whose `batch` comes
first, keep `embed` whole.
"""

import dataclasses
import functools
import logging

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | None], ...]
Axes = tuple[str | None, ...]

TRAIN_RULES: Rules = (
    ("batch", "fsdp"),
    ("length", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("patches", "fsdp"),
    ("rank", None),
)

# The engine reads every weight for every token, so weights are whole along `fsdp`.
ROLLOUT_RULES: Rules = tuple(
    (name, None if name == "embed" else axis) for name, axis in TRAIN_RULES
)

log = logging.getLogger(__name__)


def spec(logical_axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition spec of an array with these logical axes.

    Raises:
        ValueError: an axis that the table does not know.
    """
    table = dict(rules)
    used: set[str] = set()
    parts: list[str | None] = []
    for name in logical_axes:
        if name is not None and name not in table:
            raise ValueError(f"logical axis {name!r} is not among {sorted(table)}")
        axis = table[name] if name is not None else None
        axis = None if axis in used else axis
        if axis is not None:
            used.add(axis)
        parts.append(axis)
    return PartitionSpec(*parts)


@functools.lru_cache(maxsize=4096)
def sharding(mesh: Mesh, rules: Rules, logical_axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of `shape`; an axis that does not divide is left whole and logged.

    Raises:
        ValueError: as many axes as dimensions are needed.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(f"{len(logical_axes)} axes {logical_axes} for {len(shape)} dims {shape}")
    parts = list(spec(logical_axes, rules))
    for index, axis in enumerate(parts):
        if axis is not None and shape[index] % mesh.shape[axis]:
            _say_left_whole(logical_axes[index], shape[index], axis, mesh.shape[axis])
            parts[index] = None
    return NamedSharding(mesh, PartitionSpec(*parts))


@functools.cache
def _say_left_whole(name: str, size: int, axis: str, ways: int) -> None:
    """Once for all arrays alike: it costs memory, and only the user can choose another mesh."""
    log.warning(
        "axis %s of size %d is not a multiple of %s=%d: every device along %s holds all of it",
        name, size, axis, ways, axis,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with its table, hashable; without a mesh it leaves arrays alone."""

    mesh: Mesh | None = None
    rules: Rules = TRAIN_RULES

    def __call__(self, array: jax.Array, *logical_axes: str | None) -> jax.Array:
        """Ask the compiler to lay `array` out by its logical axes."""
        if self.mesh is None or self.mesh.size == 1:
            return array
        target = sharding(self.mesh, self.rules, logical_axes, array.shape)
        return jax.lax.with_sharding_constraint(array, target)

    def of(self, logical_axes: Axes, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding for a whole array, None without a mesh."""
        return None if self.mesh is None else sharding(self.mesh, self.rules, logical_axes, shape)
