"""Published CLIP and SigLIP checkpoints: the vision tower's tensors into our tree.

A whole model's folder (`CLIPModel`, `SiglipModel`) has a text tower too, which is not read. A
vision model's own folder names its tensors with or without "vision_model." before them, by the
version that wrote it.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from mmsr_jax.model import image_tower
from mmsr_jax.model.image_tower import ImageTowerConfig
from mmsr_jax.weights import hf_files, hub, image_tower_config
from mmsr_jax.weights.hf_files import DTYPES, Stored
from mmsr_jax.weights.hf_names import Path, get, put

FILES = (*hub.WEIGHTS, "preprocessor_config.json", "processor_config.json")
TOWER = "vision_model."
OTHERS = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
NAMED = 8  # problems that a message lists; a folder of something else has hundreds


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the published tensors it is made of."""

    path: Path  # in the parameter tree
    names: tuple[str, ...]  # one, or one per layer of a stacked parameter
    shape: tuple[int, ...]  # of one published tensor
    third: int | None = None  # of a tensor that holds q, k and v one above another

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"


@dataclasses.dataclass(frozen=True)
class LoadedTower:
    """A vision tower in memory."""

    graph: object  # of `image_tower.abstract`, hashable
    params: dict  # nested dict of arrays
    config: ImageTowerConfig
    folder: pathlib.Path  # where it was read, the preprocessor's file beside it


def entries(config: ImageTowerConfig) -> tuple[Entry, ...]:
    """The whole table for a tower of this size."""
    d, f, p = config.hidden, config.intermediate, config.patch_size
    clip = config.kind == "clip"
    table = [
        Entry(
            ("patch", "kernel"),
            (f"{TOWER}embeddings.patch_embedding.weight",),
            (d, 3, p, p),
        ),
        Entry(
            ("positions",), (f"{TOWER}embeddings.position_embedding.weight",), (config.tokens, d)
        ),
        *_pair(("norm_after",), (f"{TOWER}post_layernorm",), (d,)),
    ]
    if clip:
        table += [
            Entry(("first",), (f"{TOWER}embeddings.class_embedding",), (d,)),
            *_pair(("norm_before",), (f"{TOWER}pre_layrnorm",), (d,)),  # spelt so in the original
            Entry(("projection", "kernel"), ("visual_projection.weight",), (config.projection, d)),
        ]
    else:
        head, whole = f"{TOWER}head.", f"{TOWER}head.attention.in_proj_"
        table += [
            Entry(("patch", "bias"), (f"{TOWER}embeddings.patch_embedding.bias",), (d,)),
            Entry(("head", "probe"), (f"{head}probe",), (1, 1, d)),
            *_pair(("head", "attention", "proj"), (f"{head}attention.out_proj",), (d, d)),
            *_pair(("head", "norm"), (f"{head}layernorm",), (d,)),
            *_pair(("head", "mlp", "inner"), (f"{head}mlp.fc1",), (f, d)),
            *_pair(("head", "mlp", "outer"), (f"{head}mlp.fc2",), (d, f)),
        ]
        for third, name in enumerate("qkv"):
            path = ("head", "attention", name)
            table.append(Entry((*path, "kernel"), (f"{whole}weight",), (3 * d, d), third))
            table.append(Entry((*path, "bias"), (f"{whole}bias",), (3 * d,), third))
    for path, name, shape in (
        (("norm1",), "layer_norm1", (d,)),
        (("attention", "q"), "self_attn.q_proj", (d, d)),
        (("attention", "k"), "self_attn.k_proj", (d, d)),
        (("attention", "v"), "self_attn.v_proj", (d, d)),
        (("attention", "proj"), "self_attn.out_proj", (d, d)),
        (("norm2",), "layer_norm2", (d,)),
        (("mlp", "inner"), "mlp.fc1", (f, d)),
        (("mlp", "outer"), "mlp.fc2", (d, f)),
    ):
        names = tuple(f"{TOWER}encoder.layers.{index}.{name}" for index in range(config.layers))
        table += _pair(("layers", *path), names, shape)
    return tuple(table)


def _pair(path: Path, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Entry, Entry]:
    """Weight and bias of a norm (of one axis) or of a linear map."""
    weight = "scale" if len(shape) == 1 else "kernel"
    return (
        Entry((*path, weight), tuple(f"{name}.weight" for name in names), shape),
        Entry((*path, "bias"), tuple(f"{name}.bias" for name in names), shape[:1]),
    )


def load(source: pathlib.Path | str, *, dtype: str = "float32") -> LoadedTower:
    """Reads the vision tower of a checkpoint, one file or many.

    Args:
        source: a folder, or the id of a repository on the hub (`hub.resolve`).
        dtype: of the parameters and of the computation, whatever the files hold.

    Raises:
        ValueError: nothing there, a broken file, another model; tensors missing, unexpected or of
            another shape or kind, by name.
    """
    folder = hub.resolve(source, patterns=FILES)
    config = image_tower_config.read(folder, dtype)
    graph, shapes = image_tower.abstract(config)
    table = entries(config)
    stored = _stored(table, folder)
    params: dict = {}
    for entry in table:
        target = get(shapes, entry.path)
        out = np.empty(target.shape, target.dtype)
        for place, name in zip(out if entry.stacked else [out], entry.names, strict=True):
            ours = _ours(entry, stored[name].map(), place.shape)
            hf_files.copy(place, ours, ours.strides)
        put(params, entry.path, jax.device_put(out, may_alias=False))
    return LoadedTower(graph, params, config, folder)


def _ours(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One published tensor as our parameter of `shape`: a view of it."""
    if entry.third is not None:
        rows = len(tensor) // 3
        tensor = tensor[entry.third * rows : (entry.third + 1) * rows]
    if entry.path[-1] == "kernel":  # stored (out, in), or as a convolution (out, in, rows, columns)
        tensor = tensor.reshape(len(tensor), -1).T
    return tensor.reshape(shape)


def _stored(table: tuple[Entry, ...], folder: pathlib.Path) -> dict[str, Stored]:
    """Published name -> place of every tensor of the tower, all checked against the config."""
    wanted = {name: entry.shape for entry in table for name in entry.names}
    found: dict[str, Stored] = {}
    problems, texts = [], 0
    for file in hf_files.find(folder):
        for stored in hf_files.tensors(file):
            if stored.name.startswith(OTHERS):
                texts += stored.name.startswith("text_model.")
                continue
            if stored.name.endswith("position_ids"):  # 0, 1, 2, ...: older versions kept them
                continue
            name = _canonical(stored.name)
            if name in found:
                problems.append(f"twice {name}")
            found[name] = stored
    if texts and not found:
        raise ValueError(f"{folder} holds a text tower alone ({texts} tensors), which sees nothing")
    problems += [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        shape, code = found[name].shape, found[name].code
        if shape != wanted[name]:
            problems.append(f"misshaped {name} {shape}, config wants {wanted[name]}")
        if code not in DTYPES:
            problems.append(f"unreadable {name}: numbers of kind {code}, not {', '.join(DTYPES)}")
    if problems:
        problems.sort()
        more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        if problems == ["missing visual_projection.weight"]:
            more = (
                "; without its projection a CLIP tower (CLIPVisionModel) gives no vectors to "
                "compare: take CLIPModel or CLIPVisionModelWithProjection"
            )
        raise ValueError(f"{folder} does not fit its config: {', '.join(problems[:NAMED])}{more}")
    return found


def _canonical(name: str) -> str:
    """The name that a tensor has in a whole model's folder."""
    alone = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
    return f"{TOWER}{name}" if name.startswith(alone) else name
