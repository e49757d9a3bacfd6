"""Published checkpoints into our tree: every process reads what its own devices hold, no more."""

import concurrent.futures
import dataclasses
import math
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.parallel.rules import TRAIN_RULES, Rules
from mmsr_jax.weights import hf_config, hf_files, hub
from mmsr_jax.weights.hf_files import DTYPES, Stored
from mmsr_jax.weights.hf_names import Entry, canonical, entries, get, published_shape, put, to_ours

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
_READERS = 4  # layers read at a time, each with one tensor mapped
_ROWS = 4096  # of a table compared at a time


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    graph: object  # of `qwen2_5_vl.abstract`, hashable
    params: dict  # nested dict of arrays, as `qwen2_5_vl.init` makes them
    config: ModelConfig
    folder: pathlib.Path  # where it was read, tokenizer and processor files beside it


def load(
    source: pathlib.Path | str,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    config: ModelConfig | None = None,
    rules: Rules = TRAIN_RULES,
    revision: str | None = None,
) -> Loaded:
    """Read a checkpoint, one file or many, under the old or the new tensor names.

    Shards are cut from the files one at a time, the largest parameters first: on the host there
    is never more than the parameters that this process holds, one more shard, and the tensors
    that are being copied.

    Args:
        source: a folder, or the id of a repository on the hub (`hub.resolve`).
        mesh, rules: where to lay the parameters; None leaves them on the default device.
        dtype: of the parameters and of the computation; None keeps the config's.
        config: instead of the folder's config.json.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: nothing there, a broken file, another architecture; tensors missing,
            unexpected or of another shape or kind, all named in one message.
    """
    folder = hub.resolve(source, revision=revision)
    config = hf_config.read(folder) if config is None else config
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    graph, shapes = qwen2_5_vl.abstract(config, mesh, rules)
    stored = _stored(config, shapes, folder)
    table = entries(config)

    # The copy on its way to a device is then the largest while little else is there.
    def size(entry: Entry) -> int:
        target = get(shapes, entry.path)
        shape = target.shape if mesh is None else target.sharding.shard_shape(target.shape)
        return math.prod(shape)

    params: dict = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        for entry in sorted(table, key=size, reverse=True):
            pieces = [stored[name] for name in entry.published]
            put(params, entry.path, _array(entry, pieces, get(shapes, entry.path), readers))
    return Loaded(graph, params, config, folder)


def _array(entry: Entry, pieces: list[Stored], target: jax.ShapeDtypeStruct, readers) -> jax.Array:
    """One parameter, its addressable shards read one after another."""
    if target.sharding is None:
        whole = (slice(None),) * len(target.shape)
        return _place(_shard(entry, pieces, target, whole, readers), [None])[0]
    places: dict[tuple, list[jax.Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(part.indices(n)[:2] for part, n in zip(index, target.shape, strict=True))
        places.setdefault(spans, []).append(device)
    arrays = []
    for spans, devices in places.items():
        index = tuple(slice(*span) for span in spans)
        arrays += _place(_shard(entry, pieces, target, index, readers), devices)
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _place(host: np.ndarray, devices: list[jax.Device | None]) -> list[jax.Array]:
    """`host` on each of the devices (None: the default one), numpy's memory given up."""
    arrays = [jax.device_put(host, device, may_alias=False) for device in devices]
    jax.block_until_ready(arrays)
    del host
    jax.device_put(np.zeros(()))  # jax lets go of what it has copied at its next call only
    return arrays


def _shard(entry: Entry, pieces: list[Stored], target, index: tuple, readers) -> np.ndarray:
    """The part `index` of a parameter, in its final layout."""
    shape = [len(range(*part.indices(n))) for part, n in zip(index, target.shape, strict=True)]
    out = np.empty(shape, target.dtype)

    def fill(place: np.ndarray, piece: Stored, inner: tuple, part: tuple) -> None:
        source = to_ours(entry, piece.map(), inner)[part]
        hf_files.copy(place, source, source.strides)

    if not entry.stacked:
        fill(out, pieces[0], target.shape, index)
        return out
    layers = pieces[index[0]]
    jobs = [
        readers.submit(fill, place, piece, target.shape[1:], index[1:])
        for place, piece in zip(out, layers, strict=True)
    ]
    for job in jobs:
        job.result()
    return out


def _stored(config: ModelConfig, shapes: dict, folder: pathlib.Path) -> dict[str, Stored]:
    """Published name -> place of every tensor of the model, all checked against the config."""
    wanted = {
        name: published_shape(entry, get(shapes, entry.path).shape, config)
        for entry in entries(config)
        for name in entry.published
    }
    # Some programs write the head of a tied model too, equal to the embedding.
    ignored = {HEAD} if config.text.tied else set()
    found: dict[str, Stored] = {}
    problems = []
    for file in hf_files.find(folder):
        for stored in hf_files.tensors(file):
            name = canonical(stored.name)
            if name in found:
                problems.append(f"twice {name}: in {found[name].file.name} and {file.name}")
            found[name] = stored
    problems += [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted.keys() | ignored]
    for name in wanted.keys() & found.keys():
        shape, code = found[name].shape, found[name].code
        if shape != wanted[name]:
            problems.append(f"misshaped {name}: {shape}, config wants {wanted[name]}")
        if code not in DTYPES:
            problems.append(f"unreadable {name}: numbers of kind {code}, not {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config:\n  " + "\n  ".join(sorted(problems)))
    if config.text.tied and HEAD in found and not _equal(found[HEAD], found[TABLE]):
        raise ValueError(
            f"{folder}: its config ties {HEAD} to {TABLE}, and the files hold two that differ; "
            "programs disagree on which is meant: set tie_word_embeddings to false in config.json "
            f"to use both, or take {HEAD} out of the files"
        )
    return found


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same numbers, read in slabs."""
    if one.shape != other.shape or one.code not in DTYPES:
        return False
    left, right = one.map(), other.map()
    slabs = (slice(at, at + _ROWS) for at in range(0, len(left), _ROWS))
    return all(np.array_equal(left[slab], right[slab]) for slab in slabs)
