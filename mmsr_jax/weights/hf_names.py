"""One two-way table between published tensor names and our parameter tree.

Checkpoints on the hub carry the names of `published` ("model.layers.0...", "visual.blocks.0...").
Newer programs may save what they hold in memory instead ("model.language_model.layers.0...",
"model.visual.blocks.0..."): `canonical` accepts both, exports use the published ones.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mmsr_jax.model.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the published tensors it is made of."""

    path: Path  # in the parameter tree
    published: tuple[str, ...]  # one name, or one per layer of a stacked parameter
    stacked: bool
    kernel: bool  # stored (out, in) where ours is (in, out)
    patch: bool = False  # the patch embedding, stored as a 5-D convolution


_TEXT_LAYER = {
    ("input_norm", "scale"): "input_layernorm.weight",
    ("attention", "q", "kernel"): "self_attn.q_proj.weight",
    ("attention", "q", "bias"): "self_attn.q_proj.bias",
    ("attention", "k", "kernel"): "self_attn.k_proj.weight",
    ("attention", "k", "bias"): "self_attn.k_proj.bias",
    ("attention", "v", "kernel"): "self_attn.v_proj.weight",
    ("attention", "v", "bias"): "self_attn.v_proj.bias",
    ("attention", "o", "kernel"): "self_attn.o_proj.weight",
    ("post_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}

_VISION_LAYER = {
    ("norm1", "scale"): "norm1.weight",
    ("qkv", "kernel"): "attn.qkv.weight",
    ("qkv", "bias"): "attn.qkv.bias",
    ("proj", "kernel"): "attn.proj.weight",
    ("proj", "bias"): "attn.proj.bias",
    ("norm2", "scale"): "norm2.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "gate", "bias"): "mlp.gate_proj.bias",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "up", "bias"): "mlp.up_proj.bias",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
    ("mlp", "down", "bias"): "mlp.down_proj.bias",
}

_SINGLE = {
    ("text", "embed", "table"): "model.embed_tokens.weight",
    ("text", "norm", "scale"): "model.norm.weight",
    ("text", "head", "kernel"): "lm_head.weight",
    ("vision", "patch", "kernel"): "visual.patch_embed.proj.weight",
    ("vision", "merger", "norm", "scale"): "visual.merger.ln_q.weight",
    ("vision", "merger", "inner", "kernel"): "visual.merger.mlp.0.weight",
    ("vision", "merger", "inner", "bias"): "visual.merger.mlp.0.bias",
    ("vision", "merger", "outer", "kernel"): "visual.merger.mlp.2.weight",
    ("vision", "merger", "outer", "bias"): "visual.merger.mlp.2.bias",
}


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """The whole table for a model of this size, in the order of a published checkpoint."""
    table = []
    for path, name in _SINGLE.items():
        if name == "lm_head.weight" and config.text.tied:
            continue
        table.append(
            Entry(path, (name,), False, path[-1] == "kernel", name.startswith("visual.patch_embed"))
        )
    for count, head, prefix, layer in (
        (config.text.layers, ("text", "layers"), "model.layers", _TEXT_LAYER),
        (config.vision.depth, ("vision", "layers"), "visual.blocks", _VISION_LAYER),
    ):
        for path, name in layer.items():
            names = tuple(f"{prefix}.{index}.{name}" for index in range(count))
            table.append(Entry(head + path, names, True, path[-1] == "kernel"))
    return tuple(table)


def canonical(name: str) -> str:
    """The published name of a tensor under either naming."""
    for ours, published in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def published_shape(entry: Entry, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape of one published tensor, given our parameter's shape."""
    shape = shape[1:] if entry.stacked else shape
    if not entry.kernel:
        return (int(np.prod(shape)),) if entry.path[-1] == "bias" else shape
    vision = config.vision
    if entry.patch:
        side = vision.patch_size
        return (shape[1], vision.in_channels, vision.temporal_patch_size, side, side)
    inputs = 2 if entry.path[-2] in ("o", "proj") else 1  # the axes (heads, head) come in
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))


def to_ours(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One published tensor as our parameter of `shape` (without the layer axis): a view of it.

    A part of the view is therefore a part of the published tensor, to be read or to be written.
    """
    if entry.kernel:
        tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(shape)


def get(tree: dict, path: Path):
    """The leaf of a nested dict at `path`."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: dict, path: Path, leaf) -> None:
    """Hang a leaf into a nested dict at `path`."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def paths(tree: dict, path: Path = ()) -> Iterator[Path]:
    """The paths of all leaves."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from paths(node, (*path, name))
        else:
            yield (*path, name)
