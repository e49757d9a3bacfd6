"""Weights from the training mesh to a rollout mesh, chunk by chunk.

Memory holds the source, what has arrived, and one chunk, never more. Each chunk is one small
program: on the same devices a change of layout; onto other ones (a host's own, when training
spans several hosts) it is first given to every device of the training mesh, and each host keeps
its part. Small arrays travel together; a large one is cut into slices, which are written into
place as they arrive.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

CHUNK_BYTES = 1 << 28


def relayout(params: dict, shapes: dict, *, chunk_bytes: int = CHUNK_BYTES) -> dict:
    """`params` laid out as `shapes` say, equal to the bit.

    Every process that holds a part of `params` must call it, and all of them with the same
    arguments but for the devices of `shapes`. It returns when everything has arrived.

    Args:
        params: nested dict of arrays on the training mesh.
        shapes: nested dict of ShapeDtypeStruct; their shardings name the rollout mesh, of which
            this process holds every device (or which is the training mesh itself). A leaf without
            a sharding stays where it is.
        chunk_bytes: size of a chunk before it is divided: the most that a device holds beyond its
            parts of source and result, between two programs. Inside one, XLA takes scratch: at
            most twice a chunk more, 7B in float32 from 4 x 2 devices, compiled for a v5p.

    Returns: a tree like `shapes`. An array that already lies where it should is shared, not copied.

    Raises:
        ValueError: parameters of the engine that are not fed, surplus ones, or such of another
            shape or dtype, all of them named; a chunk too small for one slice of an array.
    """
    _check(params, shapes)
    wanted, structure = jax.tree_util.tree_flatten_with_path(shapes)
    out = jax.tree.leaves(params)
    small: dict = {}  # one program moves arrays between the same two sets of devices only
    for index, (path, shape) in enumerate(wanted):
        leaf, target = out[index], shape.sharding
        if target is None or leaf.sharding.is_equivalent_to(target, leaf.ndim):
            continue
        if leaf.nbytes <= chunk_bytes:
            small.setdefault(_way(leaf, target), []).append((index, target))
        else:
            out[index] = _in_slices(leaf, target, chunk_bytes, _name(path))
    for alike in small.values():
        for chunk in _chunks(alike, out, chunk_bytes):
            moved = _together([out[index] for index, _ in chunk], [target for _, target in chunk])
            for (index, _), leaf in zip(chunk, moved, strict=True):
                out[index] = leaf
    return jax.tree.unflatten(structure, out)


def _check(params: dict, shapes: dict) -> None:
    given, wanted = (
        {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, shapes)
    )
    problems = [f"{name} is not fed" for name in wanted.keys() - given.keys()]
    problems += [f"{name} is surplus" for name in given.keys() - wanted.keys()]
    for name in wanted.keys() & given.keys():
        has, needs = given[name], wanted[name]
        if (has.shape, has.dtype) != (needs.shape, needs.dtype):
            problems.append(
                f"{name} is {has.dtype}{list(has.shape)}, not {needs.dtype}{list(needs.shape)}"
            )
    if problems:
        raise ValueError("weights do not fit the engine: " + "; ".join(sorted(problems)))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _devices(sharding: Sharding) -> tuple[jax.Device, ...]:
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    if len(sharding.device_set) > 1:
        raise ValueError(f"weights on several devices need a mesh, they are laid out by {sharding}")
    return tuple(sharding.device_set)


def _way(leaf: jax.Array, target: Sharding):
    return _devices(leaf.sharding), _devices(target)


def _crosses(leaf: jax.Array, target: Sharding) -> bool:
    """Whether to other devices, or to the same in another order, which is no one program's job."""
    source, goal = _way(leaf, target)
    return source != goal


def _everywhere(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _chunks(moves: list, leaves: list, chunk_bytes: int):
    """The moves in order, as many at a time as a chunk holds."""
    chunk, filled = [], 0
    for move in moves:
        size = leaves[move[0]].nbytes
        if chunk and filled + size > chunk_bytes:
            yield chunk
            chunk, filled = [], 0
        chunk.append(move)
        filled += size
    if chunk:
        yield chunk


def _together(leaves: list[jax.Array], targets: list[Sharding]) -> list[jax.Array]:
    if not _crosses(leaves[0], targets[0]):
        moved = _mover(tuple(targets))(leaves)
        _settle(moved)
        return moved
    chunk = _mover(tuple(_everywhere(leaf.sharding) for leaf in leaves))(leaves)
    moved = [
        jax.device_put(_here(part, target), target)
        for part, target in zip(chunk, targets, strict=True)
    ]
    _settle((chunk, moved))
    return moved


def _in_slices(leaf: jax.Array, target: Sharding, chunk_bytes: int, name: str) -> jax.Array:
    cut = _cut(leaf, target, chunk_bytes, name)
    crosses = _crosses(leaf, target)
    arriving = _everywhere(leaf.sharding) if crosses else cut.seen(target)
    take, put = _taker(cut, leaf.sharding, arriving), _putter(cut, target)
    whole = _empty(leaf.shape, leaf.dtype, target)()
    for start in cut.starts():
        piece = take(leaf, start)
        if crosses:
            piece = _here(piece, target)
        whole = put(whole, piece, start)
        _settle((piece, whole))
        del piece
    return whole


def _settle(arrays) -> None:
    """Waits: without that all chunks would be on their way, and in memory, at the same time."""
    jax.block_until_ready(arrays)


def _here(chunk: jax.Array, target: Sharding) -> jax.Array:
    """An array that every device of the training mesh holds, as one that `target`'s devices do."""
    held = {shard.device: shard.data for shard in chunk.addressable_shards}
    if not held:
        raise ValueError("no device of the training mesh belongs to this process")
    some = next(iter(held.values()))
    parts = [held[d] if d in held else jax.device_put(some, d) for d in _devices(target)]
    return jax.make_array_from_single_device_arrays(chunk.shape, _everywhere(target), parts)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How an array is sliced: `count` rows of every shard at a time, along one axis.

    The axis is seen as (`ways`, rest) with all its sharding on `ways`: every device then gives and
    gets an equal part of a slice, and the place of a slice can be an argument of the program.
    """

    shape: tuple[int, ...]
    axis: int
    ways: int
    count: int

    @property
    def length(self) -> int:
        return self.shape[self.axis] // self.ways

    @property
    def inner(self) -> int:
        """The axis that is sliced, among those of the array as it is seen."""
        return self.axis + (self.ways > 1)

    def split(self, array: jax.Array) -> jax.Array:
        if self.ways == 1:
            return array
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        return array.reshape(*before, self.ways, self.length, *after)

    def seen(self, sharding: Sharding) -> Sharding:
        """The sharding of the array as it is seen."""
        if self.ways == 1 or not isinstance(sharding, NamedSharding):
            return sharding
        parts = list(sharding.spec) + [None] * (len(self.shape) - len(sharding.spec))
        parts.insert(self.inner, None)
        return NamedSharding(sharding.mesh, PartitionSpec(*parts))

    def starts(self) -> list[np.int32]:
        """The last slice moves back to be as long as the others: one program for all."""
        last = self.length - self.count
        return [np.int32(min(at, last)) for at in range(0, self.length, self.count)]


def _cut(leaf: jax.Array, target: Sharding, chunk_bytes: int, name: str) -> _Cut:
    """Along the first axis that nobody divides, else the first, whose slices are small enough."""
    source, goal = (s.shard_shape(leaf.shape) for s in (leaf.sharding, target))
    options = []
    for axis, size in enumerate(leaf.shape):
        ways = math.lcm(size // source[axis], size // goal[axis])
        row = leaf.nbytes // (size // ways)
        options.append((row, ways, axis))
    fitting = [(ways > 1, axis, ways, row) for row, ways, axis in options if row <= chunk_bytes]
    if not fitting:
        raise ValueError(
            f"a chunk of {chunk_bytes} bytes cannot hold a slice of {name}, "
            f"{min(options)[0]} bytes; raise chunk_bytes"
        )
    _, axis, ways, row = min(fitting)
    return _Cut(leaf.shape, axis, ways, min(chunk_bytes // row, leaf.shape[axis] // ways))


# Compiled once for each layout and shape, however often weights are moved.
@functools.cache
def _mover(targets: tuple[Sharding, ...]):
    return jax.jit(lambda leaves: leaves, out_shardings=list(targets))


@functools.cache
def _empty(shape: tuple[int, ...], dtype, target: Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=target)


@functools.cache
def _taker(cut: _Cut, source: Sharding, arriving: Sharding):
    def take(leaf, start):
        leaf = jax.lax.with_sharding_constraint(cut.split(leaf), cut.seen(source))
        return jax.lax.dynamic_slice_in_dim(leaf, start, cut.count, cut.inner)

    return jax.jit(take, out_shardings=arriving)


@functools.cache
def _putter(cut: _Cut, target: Sharding):
    def put(whole, piece, start):
        seen = jax.lax.with_sharding_constraint(cut.split(whole), cut.seen(target))
        seen = jax.lax.dynamic_update_slice_in_dim(seen, piece, start, cut.inner)
        return jax.lax.with_sharding_constraint(seen, cut.seen(target)).reshape(cut.shape)

    return jax.jit(put, out_shardings=target, donate_argnums=0)
