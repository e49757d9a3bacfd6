"""The model's waist: pure functions over a hashable graph and a plain nested dict of arrays.

    graph, shapes = abstract(config)          # nothing is allocated
    params = init(config, jax.random.key(0))  # or weights.hf.load(folder)
    output = forward(graph, params, inputs)

Flax stays below this line; above it parameters are what optax, orbax and the engine like best.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmsr_jax.model import cache as cache_lib
from mmsr_jax.model import lora as lora_lib
from mmsr_jax.model.apart import unstack
from mmsr_jax.model.attention import choose
from mmsr_jax.model.cache import PAGE, Cache
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.model.text import TextModel
from mmsr_jax.model.vision import VisionInputs, VisionModel
from mmsr_jax.parallel.rules import ROLLOUT_RULES, TRAIN_RULES, Placement, Rules

# The logit of an id that is never sampled. Finite, because 0 (its probability, or the weight of
# a token that is not trained on) times infinity is no number; at any sane temperature exp is 0.
NEVER = -1e30

__all__ = [
    "Cache",
    "Inputs",
    "Output",
    "VisionInputs",
    "abstract",
    "encode_images",
    "forward",
    "init",
    "init_cache",
    "init_pages",
    "token_logits",
    "unembed",
    "unstack",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of rows, each one or more packed sequences."""

    ids: jax.Array  # [B, T] int32
    positions: jax.Array  # [3, B, T] int32 M-RoPE positions (temporal, height, width)
    segments: jax.Array  # [B, T] int32: 0 padding, else the number of the packed sequence
    image_index: jax.Array  # [B, T] int32: -1 text, else the row of the image features
    vision: VisionInputs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    hidden: jax.Array  # [B, T, D] after the final norm
    logits: jax.Array | None  # [B, T, V] float32
    cache: Cache | None


class Qwen25VL(nnx.Module):
    """Both towers, with adapters when `lora` is given."""

    def __init__(
        self,
        config: ModelConfig,
        place: Placement,
        lora: lora_lib.LoRAConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.text = TextModel(config, place, rngs=rngs)
        self.vision = VisionModel(config, place, rngs=rngs)
        if lora is not None:
            lora_lib.attach(self, config, lora)


def abstract(
    config: ModelConfig,
    mesh: Mesh | None = None,
    rules: Rules = TRAIN_RULES,
    lora: lora_lib.LoRAConfig | None = None,
):
    """The graph (hashable: a static argument of jit) and the shapes of the parameters.

    Nothing is allocated. The graph remembers `mesh` and `rules`, so that the forward pass lays
    its activations out by them; a graph made for another mesh takes the same parameters. With
    `lora` graph and shapes have the adapters too (see lora.py).

    Returns:
        graph, and a nested dict of ShapeDtypeStruct with shardings (when there is a mesh).
    """
    place = Placement(mesh, rules)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Qwen25VL(config, place, lora, rngs=nnx.Rngs(params=0)))
    )
    shapes: dict = {}
    for path, variable in nnx.to_flat_state(state):
        shape, axes = variable.get_value().shape, variable.get_metadata("axes")
        # Layers stacked by vmap have one axis more than they were written with.
        axes = ("layers",) * (len(shape) - len(axes)) + axes
        node = shapes
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jax.ShapeDtypeStruct(
            shape, variable.get_value().dtype, sharding=place.of(axes, shape)
        )
    return graph, shapes


def init(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None, rules: Rules = TRAIN_RULES):
    """Random parameters: a nested dict of arrays, laid out over the mesh as they are made."""
    return _maker(config, mesh, rules)(key)


@functools.lru_cache(maxsize=8)
def _maker(config: ModelConfig, mesh: Mesh | None, rules: Rules):
    def make(key):
        model = Qwen25VL(config, Placement(None, rules), rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.split(model)[1])

    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh, rules)[1])
    # Run once: on CPU optimising the random numbers takes far longer than drawing them.
    devices = jax.devices() if mesh is None else mesh.devices.flat
    on_cpu = devices[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(make, out_shardings=shardings, compiler_options=options)


def init_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    mesh: Mesh | None = None,
    rules: Rules = ROLLOUT_RULES,
    page: int = PAGE,
) -> Cache:
    """An empty cache of `slots` tokens for each of `batch` rows, which share no pages."""
    each = -(-slots // page)
    tables = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
    return Cache(
        kv=init_pages(config, batch * each, page, mesh, rules),
        tables=tables,
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def init_pages(
    config: ModelConfig,
    pages: int,
    page: int = PAGE,
    mesh: Mesh | None = None,
    rules: Rules = ROLLOUT_RULES,
) -> jax.Array:
    """A pool of `pages` pages of `page` slots for every layer, zeros, in the platform's order."""
    text, place = config.text, Placement(mesh, rules)
    heads_first = mesh is None and choose.platform_of(place) == "cpu"
    shape = cache_lib.pool_shape(
        text.layers * pages, page, text.kv_heads, text.head_dim, heads_first
    )
    return jnp.zeros(shape, config.dtype, device=cache_lib.sharding(place, shape))


def _merge(graph, params: dict) -> tuple[Qwen25VL, dict]:
    """The model, and the parameters of each tower's layers where they are apart."""
    apart = {}
    for tower in ("text", "vision"):
        layers = params[tower]["layers"]
        if isinstance(layers, tuple):
            apart[tower] = layers
            # Something has to stand where the graph has its stack; it is not used.
            params = {**params, tower: {**params[tower], "layers": layers[0]}}
    return nnx.merge(graph, params), apart


def encode_images(graph, params, vision: VisionInputs) -> jax.Array:
    """Features [P / merge_size^2, D] of all pictures' merged tokens, in their natural order."""
    model, apart = _merge(graph, params)
    return model.vision(vision, apart.get("vision"))


def forward(
    graph,
    params,
    inputs: Inputs,
    cache: Cache | None = None,
    *,
    features: jax.Array | None = None,
    logits: bool = True,
) -> Output:
    """One pass over a batch.

    Args:
        graph, params: from `abstract` and `init`; the layers may be apart (`unstack`).
        inputs: the batch. When it has `vision`, its pictures are encoded here.
        cache: with it, row b's tokens with segments > 0 (they must come first in the row) go to
            the slots from `lengths[b]` on and attend to every slot up to their own; one sequence
            a row, though parts of it may sit in several rows with one table. Tokens past the last
            slot are lost: the caller keeps count.
        features: image features [M, D] already encoded; then `inputs.vision` is not used.
        logits: False leaves the vocabulary out (see `unembed` and `token_logits`).
    """
    model, apart = _merge(graph, params)
    if features is None and inputs.vision is not None:
        features = model.vision(inputs.vision, apart.get("vision"))
    hidden, cache = model.text(inputs, features, cache, apart.get("text"))
    return Output(hidden, model.text.unembed(hidden) if logits else None, cache)


def unembed(graph, params, hidden: jax.Array) -> jax.Array:
    """Logits float32 [..., V] of hidden states [..., D]: the published model's own."""
    return _merge(graph, params)[0].text.unembed(hidden)


def token_logits(graph, params, hidden: jax.Array) -> jax.Array:
    """`unembed` with `NEVER` at the ids of `ModelConfig.unsampled`: what is sampled from.

    The sampler and the trainer both take it, so that their log-probs mean the same thing. No
    gradient flows to a logit that is replaced.
    """
    text = _merge(graph, params)[0].text
    logits, never = text.unembed(hidden), text.config.unsampled
    return jnp.where(never, NEVER, logits) if never.any() else logits
