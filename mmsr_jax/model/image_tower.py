"""Vision towers that were trained beside a text tower: CLIP's and SigLIP's, picture to vector.

Both are pre-norm transformers over the patches of a picture of one size. CLIP reads a class token
and projects it (arXiv 2103.00020), SigLIP lets a learnt query look at all patches (2303.15343).

    graph, shapes = abstract(config)            # nothing is allocated
    vectors = encode(graph, params, pixels)     # params: weights.image_tower.load(folder)
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmsr_jax.model.attention import attend, bind
from mmsr_jax.model.layers import Dense, LayerNorm
from mmsr_jax.parallel.rules import Placement

KINDS = ("clip", "siglip")
MAX_LAYERS = 1000  # of a config; the tensors that it promises are listed before any is read
# By the names that configs use. `gelu_new` is the same formula as `gelu_pytorch_tanh`.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig:
    """Sizes of a tower. A picture is a square of `image_size` pixels."""

    kind: str  # one of KINDS
    image_size: int
    patch_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    activation: str  # one of ACTIVATIONS
    norm_eps: float
    projection: int = 0  # numbers of CLIP's vector; SigLIP's has `hidden`
    dtype: str = "float32"  # of parameters and computation

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"a tower is of kind {' or '.join(KINDS)}, not {self.kind!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is not known, only {', '.join(ACTIVATIONS)}"
            )
        for name in ("image_size", "patch_size", "hidden", "layers", "heads", "intermediate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, a whole number from 1 on is needed")
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patches of {self.patch_size} pixels do not fit pictures of {self.image_size}"
            )
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} does not divide by {self.heads} heads")
        if self.layers > MAX_LAYERS:
            raise ValueError(f"{self.layers} layers, at most {MAX_LAYERS}: no tower has so many")
        if not isinstance(self.projection, int) or (self.projection > 0) != (self.kind == "clip"):
            raise ValueError(f"projection {self.projection!r} of a {self.kind} tower")
        jnp.dtype(self.dtype)

    @property
    def side(self) -> int:
        """Patches along a side; pixels that are left over at the right and below are not seen."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches, and CLIP's class token before them."""
        return self.side**2 + (self.kind == "clip")

    @property
    def size(self) -> int:
        """Numbers of a picture's vector."""
        return self.projection or self.hidden


class MLP(nnx.Module):
    """outer(activation(inner(x)))."""

    def __init__(self, config: ImageTowerConfig, kinds: dict):
        self.activation = config.activation
        self.inner = Dense((config.hidden,), (config.intermediate,), ("embed", "mlp"), **kinds)
        self.outer = Dense((config.intermediate,), (config.hidden,), ("mlp", "embed"), **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(ACTIVATIONS[self.activation](self.inner(x)))


class Attention(nnx.Module):
    """Projections of q, k, v and of what comes out; who attends how is the caller's."""

    def __init__(self, config: ImageTowerConfig, kinds: dict):
        heads = (config.heads, config.hidden // config.heads)
        axes = ("embed", "heads", "head")
        self.q = Dense((config.hidden,), heads, axes, **kinds)
        self.k = Dense((config.hidden,), heads, axes, **kinds)
        self.v = Dense((config.hidden,), heads, axes, **kinds)
        self.proj = Dense(heads, (config.hidden,), ("heads", "head", "embed"), **kinds)

    def __call__(self, of: jax.Array, to: jax.Array, attention) -> jax.Array:
        """`of` [B, T, D] looks at `to` [B, S, D]: [B, T, D]."""
        return self.proj(attention(self.q(of), self.k(to), self.v(to)))


class TowerLayer(nnx.Module):
    """Pre-norm attention and MLP, all with biases."""

    def __init__(self, config: ImageTowerConfig, *, rngs: nnx.Rngs):
        kinds = _kinds(config, rngs)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attention, self.mlp = Attention(config, kinds), MLP(config, kinds)

    def __call__(self, x: jax.Array, attention) -> jax.Array:
        normal = self.norm1(x)
        x = x + self.attention(normal, normal, attention)
        return x + self.mlp(self.norm2(x))


class PoolingHead(nnx.Module):
    """SigLIP's: a learnt query looks at all patches, an MLP behind it."""

    def __init__(self, config: ImageTowerConfig, *, rngs: nnx.Rngs):
        kinds = _kinds(config, rngs)
        self.probe = nnx.Param(jnp.zeros((config.hidden,), config.dtype), axes=("embed",))
        self.attention, self.norm = Attention(config, kinds), _norm(config)
        self.mlp = MLP(config, kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, D]."""
        probe = jnp.broadcast_to(self.probe[...], (len(x), 1, x.shape[2])).astype(x.dtype)
        everyone = jnp.ones((len(x), 1, x.shape[1]), bool)
        seen = self.attention(probe, x, lambda q, k, v: attend(q, k, v, everyone))
        return (seen + self.mlp(self.norm(seen)))[:, 0]


class ImageTower(nnx.Module):
    """Pixels [B, 3, image_size, image_size] to vectors [B, size], as long as they come out."""

    def __init__(self, config: ImageTowerConfig, *, rngs: nnx.Rngs):
        self.config = config
        clip = config.kind == "clip"
        kinds = _kinds(config, rngs)
        self.patch = Dense(
            (3 * config.patch_size**2,),
            (config.hidden,),
            (None, "embed"),
            **kinds | {"bias": not clip},
        )
        positions = jnp.zeros((config.tokens, config.hidden), config.dtype)
        self.positions = nnx.Param(positions, axes=(None, "embed"))
        if clip:
            self.head = None
            self.first = nnx.Param(jnp.zeros((config.hidden,), config.dtype), axes=("embed",))
            self.norm_before = _norm(config)
            self.projection = Dense(
                (config.hidden,),
                (config.projection,),
                ("embed", None),
                **kinds | {"bias": False},
            )
        else:
            self.first = self.norm_before = self.projection = None
            self.head = PoolingHead(config, rngs=rngs)

        @nnx.vmap
        def stacked(key):
            return TowerLayer(config, rngs=nnx.Rngs(params=key))

        self.layers = stacked(jax.random.split(rngs.params(), config.layers))
        self.norm_after = _norm(config)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        x = self.patch(_patches(pixels, config))
        if self.first is not None:
            first = jnp.broadcast_to(self.first[...], (len(x), 1, config.hidden))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        x = x + self.positions[...].astype(x.dtype)
        if self.norm_before is not None:
            x = self.norm_before(x)
        attention = bind(
            "auto",
            jnp.ones(x.shape[:2], bool),
            causal=False,
            head_dim=config.hidden // config.heads,
            dtype=config.dtype,
            place=Placement(),
        )
        graph, params = nnx.split(self.layers)

        def body(x, layer_params):
            return nnx.merge(graph, layer_params)(x, attention), None

        x = jax.lax.scan(body, x, params)[0]
        if self.head is not None:
            return self.head(self.norm_after(x))
        return self.projection(self.norm_after(x[:, 0]))


def _kinds(config: ImageTowerConfig, rngs: nnx.Rngs) -> dict:
    return {"rngs": rngs, "bias": True, "dtype": config.dtype, "param_dtype": config.dtype}


def _norm(config: ImageTowerConfig) -> LayerNorm:
    return LayerNorm(config.hidden, config.norm_eps, param_dtype=config.dtype)


def _patches(pixels: jax.Array, config: ImageTowerConfig) -> jax.Array:
    """[B, 3, image_size, image_size] to [B, side * side, 3 * patch * patch], row by row."""
    side, patch = config.side, config.patch_size
    seen = pixels[:, :, : side * patch, : side * patch]
    cut = seen.reshape(-1, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(-1, side * side, 3 * patch * patch)


def abstract(config: ImageTowerConfig):
    """The graph (hashable: a static argument of jit) and a nested dict of ShapeDtypeStruct."""
    graph, state = nnx.split(nnx.eval_shape(lambda: ImageTower(config, rngs=nnx.Rngs(params=0))))
    return graph, nnx.to_pure_dict(state)


def encode(graph, params: dict, pixels: jax.Array) -> jax.Array:
    """Vectors [B, size] float32, each of length 1.

    Args:
        graph: of `abstract`.
        pixels: [B, 3, image_size, image_size] float32, normalised.
    """
    # Else float32 means less than float32 on GPU and TPU, and an index that was built there would
    # be asked with other numbers elsewhere.
    with jax.default_matmul_precision("highest"):
        vectors = nnx.merge(graph, params)(pixels).astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
