"""Our tree as a published checkpoint: a folder that transformers and vLLM load."""

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.weights import hf_config, hf_files
from mmsr_jax.weights.hf_names import Entry, entries, get, paths, published_shape, to_ours
from mmsr_jax.weights.hub import CARRIED, CONFIG, INDEX, SINGLE

_CODES = {"bfloat16": "BF16", "float32": "F32"}
# "format" is what transformers asks for; the other word tells our exports from anything else.
_WORDS = {"format": "pt", "written_by": "mmsr_jax"}

Piece = tuple[Entry, int, str]  # a parameter, a layer of it, its published name


def save(
    params: dict,
    config: ModelConfig,
    folder: pathlib.Path | str,
    *,
    source: pathlib.Path | str | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and safetensors under the published names.

    Everything is written beside `folder` first and put in its place when it is whole. Beyond the
    parameters the host holds one tensor at a time.

    Args:
        params: nested dict of arrays, laid out in any way over devices of this process.
        folder: new, empty, or an earlier export, which it replaces.
        source: folder whose tokenizer, processor and generation files are copied as they are.
        dtype: of the tensors on disk, "bfloat16" or "float32".
        shard_bytes: files are cut so that none is much larger; a single one has no index.

    Raises:
        ValueError: parameters that do not match the config or lie on other processes too; a
            folder that holds anything but an earlier export; another dtype; sizes that published
            checkpoints cannot have.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    if dtype not in _CODES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_CODES)}")
    check_target(folder)
    described = hf_config.flat(config, dtype)
    shapes = qwen2_5_vl.abstract(config)[1]
    _check(params, shapes)
    partial = folder.with_name(f".{folder.name}.mmsr-partial")
    _remove(partial)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        write_weights(
            partial, config, dtype, shard_bytes,
            lambda entry, layer, shape: _published(
                entry, layer, get(params, entry.path), shape, dtype
            ),
        )  # fmt: skip
        (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        for name in CARRIED if source is not None else ():
            if (pathlib.Path(source) / name).is_file():
                shutil.copyfile(pathlib.Path(source) / name, partial / name)
        _replace(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(folder: pathlib.Path) -> None:
    """Whether an export may be written to `folder`.

    Raises:
        ValueError: a file, or a folder with anything in it but an earlier export.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder")
    files = list(folder.glob("*.safetensors"))
    strangers = _strangers(folder) + [file.name for file in files if not _ours(file)]
    if not files:
        strangers = [path.name for path in folder.iterdir()]
    if strangers:
        raise ValueError(
            f"{folder} is neither empty nor an earlier export: it holds "
            f"{', '.join(sorted(strangers)[:5])}; choose another folder, or delete it"
        )


def _ours(file: pathlib.Path) -> bool:
    try:
        return hf_files.metadata(file).get("written_by") == _WORDS["written_by"]
    except ValueError:  # broken, so not ours to judge
        return False


def _strangers(folder: pathlib.Path) -> list[str]:
    """Names in `folder` that no export writes."""
    own = {CONFIG, INDEX, *CARRIED}
    return [
        path.name
        for path in folder.iterdir()
        if path.name not in own and not (path.match("model*.safetensors") and path.is_file())
    ]


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
    """Put `new` where `folder` is; the old one goes when the new one stands."""
    old = folder.with_name(f".{folder.name}.mmsr-old")
    _remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    _remove(old)


def _remove(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    if strangers := _strangers(folder):
        raise ValueError(f"{folder} is in the way: it holds {', '.join(strangers[:5])}; move it")
    shutil.rmtree(folder)


def _check(params: dict, shapes: dict) -> None:
    problems = [
        f"{'.'.join(path)} {'missing' if path not in set(paths(params)) else 'unexpected'}"
        for path in sorted(set(paths(params)) ^ set(paths(shapes)))
    ]
    for path in sorted(set(paths(params)) & set(paths(shapes))):
        array, wanted = get(params, path), get(shapes, path).shape
        if array.shape != wanted:
            problems.append(f"{'.'.join(path)} {array.shape}, config wants {wanted}")
        elif isinstance(array, jax.Array) and not array.is_fully_addressable:
            problems.append(f"{'.'.join(path)} lies on other processes too: export from one")
    if problems:
        raise ValueError("parameters that do not match the config: " + ", ".join(problems))


def write_weights(
    folder: pathlib.Path,
    config: ModelConfig,
    dtype: str,
    shard_bytes: int,
    make: Callable[[Entry, int, tuple[int, ...]], np.ndarray],
) -> None:
    """The weight files and their index; `make` gives a layer of a parameter in published shape."""
    shapes = qwen2_5_vl.abstract(config)[1]
    item = jnp.dtype(dtype).itemsize
    plan = _plan(config, shapes, item, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, pieces in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        sizes = {
            name: published_shape(entry, get(shapes, entry.path).shape, config)
            for entry, _, name in pieces
        }
        made = (make(entry, layer, sizes[name]) for entry, layer, name in pieces)
        hf_files.write(folder / file, sizes, _CODES[dtype], made, _WORDS)
        weight_map |= dict.fromkeys(sizes, file)
    if len(plan) > 1:
        total = item * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _published(entry: Entry, layer: int, array, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """One published tensor, put together from the shards of our parameter."""
    out = np.empty(shape, jnp.dtype(dtype))
    ours = to_ours(entry, out, array.shape[1:] if entry.stacked else array.shape)
    if not np.may_share_memory(out, ours):
        raise RuntimeError(f"{entry.path} is no view of its published tensor")
    for index, data in _shards(array):
        if entry.stacked:
            first, end, _ = index[0].indices(array.shape[0])
            if not first <= layer < end:
                continue
            # On the device: the other layers need not travel.
            data = jax.lax.dynamic_index_in_dim(data, layer - first, 0, keepdims=False)
            index = index[1:]
        part = ours[index]
        hf_files.copy(part, np.asarray(data), part.strides)
    return out


def _shards(array) -> Iterator[tuple[tuple[slice, ...], jax.Array | np.ndarray]]:
    """The parts of an array, each once, with their places in the whole."""
    if not isinstance(array, jax.Array):
        yield (slice(None),) * array.ndim, array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, shard.data


def _plan(config: ModelConfig, shapes: dict, item: int, shard_bytes: int) -> list[list[Piece]]:
    """Which tensors go to which file."""
    plan: list[list[Piece]] = [[]]
    filled = 0
    for entry in entries(config):
        shape = get(shapes, entry.path).shape
        size = item * math.prod(shape[1:] if entry.stacked else shape)
        for index, name in enumerate(entry.published):
            if plan[-1] and filled + size > shard_bytes:
                plan.append([])
                filled = 0
            plan[-1].append((entry, index, name))
            filled += size
    return plan
