"""The language model: a Qwen2 decoder with three-axis rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mmsr_jax.model import rope
from mmsr_jax.model import window as window_lib
from mmsr_jax.model.attention import bind, bind_cached
from mmsr_jax.model.cache import Cache, places, sharding, write
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.model.layers import Dense, Embedding, GatedMLP, RMSNorm
from mmsr_jax.model.window import Window
from mmsr_jax.parallel.rules import Placement


class SelfAttention(nnx.Module):
    """The four projections. Queries, keys and values have biases, the output has none."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        text = config.text
        kinds = {"rngs": rngs, "dtype": config.dtype, "param_dtype": config.param_dtype}
        wide, narrow = (text.heads, text.head_dim), (text.kv_heads, text.head_dim)
        axes = ("embed", "kv_heads", "head")
        self.q = Dense((text.hidden,), wide, ("embed", "heads", "head"), bias=True, **kinds)
        self.k = Dense((text.hidden,), narrow, axes, bias=True, **kinds)
        self.v = Dense((text.hidden,), narrow, axes, bias=True, **kinds)
        out_scale = (2 * text.layers) ** -0.5
        self.o = Dense(wide, (text.hidden,), ("heads", "head", "embed"), scale=out_scale, **kinds)


class TextLayer(nnx.Module):
    """One decoder layer, cut in two around the attention so that a cache can sit between."""

    def __init__(self, config: ModelConfig, place: Placement, *, rngs: nnx.Rngs):
        text = config.text
        self.place = place
        self.input_norm = RMSNorm(text.hidden, text.norm_eps, param_dtype=config.param_dtype)
        self.attention = SelfAttention(config, rngs=rngs)
        self.post_norm = RMSNorm(text.hidden, text.norm_eps, param_dtype=config.param_dtype)
        self.mlp = GatedMLP(
            text.hidden,
            text.intermediate,
            rngs=rngs,
            bias=False,
            out_scale=(2 * text.layers) ** -0.5,
            place=place,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )

    def before(self, x: jax.Array, cos: jax.Array, sin: jax.Array):
        """Rotated queries and keys, and values: [B, T, N or K, H]."""
        y = self.input_norm(x)
        q = self.place(self.attention.q(y), "batch", "length", "heads", "head")
        k = self.place(self.attention.k(y), "batch", "length", "kv_heads", "head")
        v = self.place(self.attention.v(y), "batch", "length", "kv_heads", "head")
        return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v

    def after(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The rest of the layer, x [B, T, D] and attended [B, T, N, H]."""
        x = x + self.place(self.attention.o(attended), "batch", "length", "embed")
        x = x + self.mlp(self.post_norm(x), "batch", "length")
        return self.place(x, "batch", "length", "embed")


class TextModel(nnx.Module):
    """Embedding, stacked layers, final norm, head."""

    def __init__(self, config: ModelConfig, place: Placement, *, rngs: nnx.Rngs):
        text = config.text
        kinds = {"rngs": rngs, "dtype": config.dtype, "param_dtype": config.param_dtype}
        self.config, self.place = config, place
        self.embed = Embedding(text.vocab_size, text.hidden, **kinds)

        @nnx.vmap
        def stacked(key):
            return TextLayer(config, place, rngs=nnx.Rngs(params=key))

        self.layers = stacked(jax.random.split(rngs.params(), text.layers))
        self.norm = RMSNorm(text.hidden, text.norm_eps, param_dtype=config.param_dtype)
        head = None
        if not text.tied:
            head = Dense((text.hidden,), (text.vocab_size,), ("embed", "vocab"), **kinds)
        self.head = head

    def __call__(
        self,
        inputs,
        features: jax.Array | None,
        cache: Cache | Window | None,
        apart: tuple[dict, ...] | None = None,
    ):
        """Hidden states [B, T, D] after the final norm, and the grown cache.

        `apart` are the parameters of the layers one by one, used instead of the stack.
        """
        text = self.config.text
        x = self._embed(inputs.ids, inputs.image_index, features)
        cos, sin = rope.text_angles(
            inputs.positions, text.head_dim, text.rope_theta, text.mrope_section
        )
        # The rotation itself runs in the compute dtype, as in the original (unlike vision).
        turn = cos.astype(x.dtype), sin.astype(x.dtype)
        if cache is None:
            x = self._run(x, turn, inputs.segments, apart)
        elif isinstance(cache, Window):
            x, cache = self._run_window(x, turn, inputs.segments[:, 0] > 0, cache, apart)
        else:
            x, cache = self._run_cached(x, turn, inputs.segments, cache, apart)
        return self.norm(x), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [..., V] of hidden states [..., D]."""
        lead, hidden = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
        # Contract without transposing the table: in a small model it is as large as the rest.
        tables, dim = (self.embed.parts, 1) if self.head is None else ((self.head.kernel[...],), 0)
        hidden = hidden.astype(self.config.dtype)
        logits = [
            jax.lax.dot_general(
                hidden,
                table.astype(self.config.dtype),
                (((1,), (dim,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for table in tables
        ]
        logits = logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=-1)
        return logits.reshape(lead + (self.config.text.vocab_size,))

    def _embed(self, ids, image_index, features):
        x = self.embed(ids)
        if features is not None:
            # Out of range rather than -1: filled on the way in, dropped on the way back.
            row = jnp.where(image_index < 0, features.shape[0], image_index)
            pictures = features.astype(x.dtype).at[row].get(mode="fill", fill_value=0)
            x = jnp.where((image_index >= 0)[..., None], pictures, x)
        return self.place(x, "batch", "length", "embed")

    def _run(self, x, turn, segments, apart):
        graph, params = nnx.split(self.layers)
        attention = bind(
            self.config.attention,
            segments,
            causal=True,
            head_dim=self.config.text.head_dim,
            dtype=self.config.dtype,
            place=self.place,
        )

        def body(x, layer_params):
            layer = nnx.merge(graph, layer_params)
            q, k, v = layer.before(x, *turn)
            return layer.after(x, attention(q, k, v)), None

        if self.config.remat:
            # Outside a loop XLA would find the two computations equal and keep the first.
            body = jax.checkpoint(body, prevent_cse=apart is not None)
        if apart is None:
            return jax.lax.scan(body, x, params)[0]
        for layer_params in apart:
            x, _ = body(x, layer_params)
        return x

    def _run_cached(self, x, turn, segments, cache, apart):
        graph, params = nnx.split(self.layers)
        pages = cache.kv.shape[0] // self.config.text.layers
        page, slot = places(cache, segments)
        grown = cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        attention = bind_cached(
            self.config.cached_attention,
            cache,
            segments,
            heads=self.config.text.heads,
            place=self.place,
        )

        # The pool is a carry, not scanned inputs and outputs: those would be copied every token.
        # All rows write before any reads, so that parts of one conversation may sit in several
        # rows of one call.
        def body(carry, layer_params):
            x, kv, first = carry
            layer = nnx.merge(graph, layer_params)
            q, k, v = layer.before(x, *turn)
            kv = write(kv, first, page, slot, k, v)
            return (layer.after(x, attention(q, kv, first)), kv, first + pages), None

        carry = (x, cache.kv, jnp.int32(0))
        if apart is None:
            carry, _ = jax.lax.scan(body, carry, params)
        for layer_params in apart or ():
            carry, _ = body(carry, layer_params)
        x, kv, _ = carry
        if self.place.mesh is not None:  # as it came: a donated pool is used in place
            kv = jax.lax.with_sharding_constraint(kv, sharding(self.place, kv.shape))
        return x, Cache(kv=kv, tables=cache.tables, lengths=grown)

    def _run_window(self, x, turn, active, window, apart):
        if apart is None:
            raise ValueError("a window is for layers apart: unstack the parameters")
        graph, _ = nnx.split(self.layers)
        grown = []
        for index, layer_params in enumerate(apart):
            layer = nnx.merge(graph, layer_params)
            attended, *held = window_lib.attend(window, index, *layer.before(x, *turn), active)
            grown.append(held)
            x = layer.after(x, attended)
        layers, added = zip(*grown, strict=True)
        return x, Window(layers, added, window.steps + 1, window.lengths + active)
