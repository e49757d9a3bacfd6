"""LoRA (arXiv 2106.09685): y = x W + (alpha / rank) (x A) B, with W frozen.

A and B are leaves of their own beside each kernel, stacked over layers as the kernel is:

    config = LoRAConfig(rank=8, targets=("q_proj", "v_proj"))
    graph, shapes = qwen2_5_vl.abstract(model, lora=config)  # the graph that uses adapters
    adapter = init(split(shapes)[1], jax.random.key(0))
    output = qwen2_5_vl.forward(graph, join(base, adapter), inputs)

`base` is never copied nor touched: the graph made without `lora` runs it as it was.
Letters: `L` layers, `R` adapter rank.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmsr_jax.model.config import ModelConfig

Path = tuple[str, ...]
A, B = "lora_a", "lora_b"  # A: [L, inputs, R]; B: [L, R, outputs]; no L outside the stacks


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters, the only weights that are trained then.

    A target is a regular expression that matches a module's whole name, or the end of it after a
    dot, as in PEFT: "q_proj", "mlp.0", or "language_model.layers.[0-9]+.mlp.gate_proj". Names are
    those of transformers 5 in memory (`modules` lists them).
    """

    rank: int = 16
    alpha: float = 32.0  # the product is scaled by alpha / rank
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    vision: bool = False  # the vision tower's modules can be targets too
    param_dtype: str = "float32"  # of the adapters; they are used in the model's dtype

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"LoRA needs rank >= 1 and alpha > 0, got rank {self.rank}, alpha {self.alpha}"
            )
        if not self.targets:
            raise ValueError("LoRA needs at least one target, such as q_proj")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"LoRA target {pattern!r} is no regular expression: {error}"
                ) from None
        jnp.dtype(self.param_dtype)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear map that can have an adapter."""

    path: Path  # in our tree
    names: tuple[str, ...]  # in transformers' model, one per layer when stacked
    stacked: bool


_TEXT = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_VISION = {
    ("qkv",): "attn.qkv",
    ("proj",): "attn.proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_MERGER = {"inner": "model.visual.merger.mlp.0", "outer": "model.visual.merger.mlp.2"}


def modules(config: ModelConfig, *, vision: bool) -> tuple[Module, ...]:
    """Everything that can have an adapter: text layers, with `vision` also the tower's."""
    stacks = [("text", config.text.layers, "model.language_model.layers", _TEXT)]
    if vision:
        stacks.append(("vision", config.vision.depth, "model.visual.blocks", _VISION))
    found = [
        Module((tower, "layers", *path), tuple(f"{prefix}.{i}.{name}" for i in range(count)), True)
        for tower, count, prefix, table in stacks
        for path, name in table.items()
    ]
    if vision:
        found += [
            Module(("vision", "merger", ours), (name,), False) for ours, name in _MERGER.items()
        ]
    return tuple(found)


def targeted(config: ModelConfig, lora: LoRAConfig) -> tuple[Module, ...]:
    """The modules that some target matches.

    Raises:
        ValueError: a target that matches nothing, or not all layers of a module.
    """
    candidates = modules(config, vision=lora.vision)
    hidden = [m for m in modules(config, vision=True) if m not in candidates]
    chosen = set()
    for pattern in lora.targets:
        whole = re.compile(rf"(.*\.)?({pattern})")
        hits = {m: [bool(whole.fullmatch(name)) for name in m.names] for m in candidates}
        matched = {m for m, layers in hits.items() if any(layers)}
        if not matched:
            raise ValueError(
                f"LoRA target {pattern!r} matches no module; there are {_endings(candidates)}"
                + ("" if lora.vision else f"; with vision = True also {_endings(hidden)}")
            )
        for m in sorted(matched, key=lambda m: m.path):
            if not all(hits[m]):
                raise ValueError(
                    f"LoRA target {pattern!r} matches {sum(hits[m])} of {len(m.names)} layers of "
                    f"{_endings([m])}; layers are stacked, so a target takes all of them or none"
                )
        chosen |= matched
    return tuple(m for m in candidates if m in chosen)


def exact(chosen: tuple[Module, ...]) -> tuple[str, ...]:
    """Targets that match these modules and no others."""
    return tuple(_pattern(m) for m in chosen)


def _pattern(m: Module) -> str:
    name = re.escape(m.names[0].removeprefix("model."))
    return name.replace(r"\.0\.", r"\.[0-9]+\.", 1) if m.stacked else name


def _endings(candidates: Sequence[Module]) -> str:
    """ "self_attn.q_proj, ..., visual.merger.mlp.0": names without what repeats."""
    names = [re.sub(r".*\.(layers|blocks)\.\d+\.", "", m.names[0]) for m in candidates]
    return ", ".join(dict.fromkeys(name.removeprefix("model.") for name in names))


def attach(model, config: ModelConfig, lora: LoRAConfig) -> None:
    """Gives the targeted `layers.Dense` of a model (both towers) their adapters, all zero."""
    for m in targeted(config, lora):
        dense = model
        for name in m.path:
            dense = getattr(dense, name)
        dense.adapt(lora.rank, lora.scale, lora.param_dtype)


def init(shapes: dict, key: jax.Array) -> dict:
    """A fresh adapter: A uniform within 1/sqrt(inputs) as PEFT draws it, B zero.

    Args:
        shapes: the adapter's half of `split(abstract(...)[1])`.

    Returns: arrays laid out as `shapes` says. Its product is zero: nothing changes yet.
    """

    def draw(path, leaf):
        if path[-1].key == B:
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))  # whatever the other targets are
        bound = 1 / math.sqrt(math.prod(leaf.shape[_lead(path) : -1]))
        return jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound).astype(leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    # Run once: on CPU optimising the random numbers takes far longer than drawing them.
    on_cpu = jax.default_backend() == "cpu"
    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(draw, shapes),
        out_shardings=shardings if jax.tree.leaves(shardings) else None,
        compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None,
    )
    return make()


def _layers_apart(node) -> bool:
    """Whether a node holds one tree a layer (`apart.unstack`); a cut token table holds arrays."""
    return isinstance(node, tuple) and isinstance(node[0], dict)


def split(params: dict) -> tuple[dict, dict]:
    """(base, adapter) of a tree with both: new dicts around the same leaves."""
    base, adapter = {}, {}
    for name, node in params.items():
        if _layers_apart(node):
            halves = [split(layer) for layer in node]
            below, own = (tuple(half) if any(half) else () for half in zip(*halves, strict=True))
        elif isinstance(node, dict):
            below, own = split(node)
        else:
            (adapter if name in (A, B) else base)[name] = node
            continue
        if below:
            base[name] = below
        if own:
            adapter[name] = own
    return base, adapter


def join(base: dict, adapter: dict) -> dict:
    """The tree with both: new dicts around the same leaves."""
    out = dict(base)
    for name, node in adapter.items():
        below = out.get(name)
        if _layers_apart(node):
            out[name] = tuple(join(*both) for both in zip(below, node, strict=True))
        else:
            out[name] = join(below or {}, node) if isinstance(node, dict) else node
    return out


def merge(params: dict, lora: LoRAConfig, dtype: str | None = None) -> dict:
    """Base parameters with W + alpha / rank * A B in place of W, added in float32.

    Args:
        params: base and adapter joined.
        dtype: of the sums; None is the kernel's own. Small changes of a bfloat16 kernel survive in
            float32 only.

    Returns: a tree without adapters; leaves that had none are the same objects.
    """

    def walk(node: dict, stacked: bool) -> dict:
        out = {}
        for name, child in node.items():
            if _layers_apart(child):
                out[name] = tuple(walk(layer, False) for layer in child)
            elif isinstance(child, dict):
                out[name] = walk(child, stacked or name == "layers")
            elif name not in (A, B):
                out[name] = child
        if A in node:
            kernel = node["kernel"]
            merger = _merger(lora.scale, stacked, dtype or kernel.dtype.name, kernel.sharding)
            out["kernel"] = merger(kernel, node[A], node[B])
        return out

    return walk(params, False)


@functools.lru_cache(maxsize=64)
def _merger(scale: float, stacked: bool, dtype: str, sharding):
    """jit of (kernel, A, B) -> merged kernel, laid out by `sharding`."""

    def one(each):
        kernel, a, b = (x.astype(jnp.float32) for x in each)
        rank = a.shape[-1]
        delta = jnp.dot(a.reshape(-1, rank), b.reshape(rank, -1), precision="highest")
        return (kernel + scale * delta.reshape(kernel.shape)).astype(dtype)

    # Layer by layer: a whole stack in float32 may be several times a device's free memory.
    def whole(*each):
        return jax.lax.map(one, each) if stacked else one(each)

    return jax.jit(whole, out_shardings=sharding)


def _lead(path) -> int:
    """Axes before a parameter's own: one for stacked layers."""
    return int(any(part.key == "layers" for part in path))
