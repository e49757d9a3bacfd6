"""Published checkpoints in safetensors: read into our tree, written from it."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.parallel.rules import TRAIN_RULES, Rules
from mmsr_jax.weights import hf_config
from mmsr_jax.weights.hf_names import (
    Entry,
    Path,
    canonical,
    entries,
    published_shape,
    to_ours,
    to_published,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that go with the weights and do not change with them.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory."""

    graph: object  # of `qwen2_5_vl.abstract`, hashable
    params: dict  # nested dict of arrays, as `qwen2_5_vl.init` makes them
    config: ModelConfig


def load(
    folder: pathlib.Path | str,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    config: ModelConfig | None = None,
    rules: Rules = TRAIN_RULES,
) -> Loaded:
    """Read a checkpoint folder, one file or many, under the old or the new tensor names.

    Args:
        mesh, rules: where to lay the parameters; None leaves them on the default device.
        dtype: of the parameters and of the computation; None keeps the config's.
        config: instead of the folder's config.json.

    Raises:
        ValueError: tensors missing, unexpected or of another shape, all named in one message.
    """
    folder = pathlib.Path(folder)
    config = hf_config.read(folder) if config is None else config
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    graph, shapes = qwen2_5_vl.abstract(config, mesh, rules)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(config, shapes, tensors, folder)
        params: dict = {}
        for entry in entries(config):
            target = _get(shapes, entry.path)
            inner = target.shape[1:] if entry.stacked else target.shape
            ours = np.empty(target.shape, target.dtype)
            for index, name in enumerate(entry.published):
                file, key = tensors[name]
                place = ours[index] if entry.stacked else ours
                place[...] = to_ours(entry, file.get_tensor(key), inner)
            _put(params, entry.path, _lay_out(ours, target.sharding))
    return Loaded(graph, params, config)


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

    Args:
        params: nested dict of arrays that this process can read whole.
        source: folder whose tokenizer, processor and generation files are copied as they are.
        dtype: of the tensors on disk.
        shard_bytes: files are cut so that none is much larger; a single one has no index.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = qwen2_5_vl.abstract(config)[1]
    paths = {entry.path for entry in entries(config)}
    if strays := sorted(set(_leaves(params)) ^ paths):
        raise ValueError(f"parameters that do not match the config: {_names(strays)}")
    item = jnp.dtype(dtype).itemsize
    total = item * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    plan = _plan(config, shapes, item, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, pieces in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for entry, index, name in pieces:
            array = _get(params, entry.path)
            array = np.asarray(array[index] if entry.stacked else array).astype(jnp.dtype(dtype))
            shape = published_shape(entry, _get(shapes, entry.path).shape, config)
            tensors[name] = to_published(entry, array, shape)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(hf_config.flat(config, dtype), indent=2) + "\n")
    for name in CARRIED if source is not None else ():
        if (pathlib.Path(source) / name).is_file():
            shutil.copyfile(pathlib.Path(source) / name, folder / name)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple]:
    """Published name -> (open file, name in that file) of every tensor in the folder."""
    if (folder / INDEX).exists():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    tensors = {}
    for name in names:
        file = stack.enter_context(safe_open(folder / name, framework="numpy"))
        tensors.update({canonical(key): (file, key) for key in file.keys()})  # noqa: SIM118
    return tensors


def _check(config: ModelConfig, shapes: dict, tensors: dict[str, tuple], folder) -> None:
    wanted = {
        name: published_shape(entry, _get(shapes, entry.path).shape, config)
        for entry in entries(config)
        for name in entry.published
    }
    # Some programs write the head of a tied model too; it equals the embedding.
    ignored = {"lm_head.weight"} if config.text.tied else set()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted.keys() | ignored]
    for name in wanted.keys() & tensors.keys():
        file, key = tensors[name]
        found = tuple(file.get_slice(key).get_shape())
        if found != wanted[name]:
            problems.append(f"misshaped {name}: {found}, config wants {wanted[name]}")
    if problems:
        raise ValueError(f"{folder} does not fit its config:\n  " + "\n  ".join(sorted(problems)))


def _plan(
    config: ModelConfig, shapes: dict, item: int, shard_bytes: int
) -> list[list[tuple[Entry, int, str]]]:
    """Which tensors go to which file."""
    plan: list[list[tuple[Entry, int, str]]] = [[]]
    filled = 0
    for entry in entries(config):
        shape = _get(shapes, entry.path).shape
        size = item * math.prod(shape[1:] if entry.stacked else shape)
        for index, name in enumerate(entry.published):
            if plan[-1] and filled + size > shard_bytes:
                plan.append([])
                filled = 0
            plan[-1].append((entry, index, name))
            filled += size
    return plan


def _lay_out(array: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _get(tree: dict, path: Path):
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict, path: Path, leaf) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _leaves(tree: dict, path: Path = ()) -> Iterator[Path]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name)


def _names(paths) -> str:
    return ", ".join(".".join(path) for path in paths)
