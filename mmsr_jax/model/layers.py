"""Building blocks. Every parameter carries the names of its logical axes."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mmsr_jax.parallel.rules import Axes


class Dense(nnx.Module):
    """A linear map from the last axes of x (`inputs`) to new last axes (`outputs`).

    The kernel keeps heads apart ([D, N, H], not [D, N*H]), so that a mesh axis splits whole heads
    or nothing. Rows are flattened first: one plain matrix product, which is what every backend
    does best (on CPU its gradient takes half the time of the batched one).
    """

    lora_a = lora_b = None  # until `adapt`

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: Axes,
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        scale: float = 1.0,
        dtype: str,
        param_dtype: str,
    ):
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype
        deviation = scale / math.sqrt(math.prod(inputs))
        kernel = deviation * jax.random.normal(rngs.params(), inputs + outputs, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)
        zeros = nnx.Param(jnp.zeros(outputs, param_dtype), axes=axes[len(inputs) :])
        self.bias = zeros if bias else None

    def adapt(self, rank: int, scale: float, param_dtype: str) -> None:
        """Adds a low-rank adapter of zeros (see lora.py), stacked if the kernel is by now."""
        kernel, axes, n = self.kernel[...], self.kernel.get_metadata("axes"), len(self.inputs)
        lead = kernel.shape[: kernel.ndim - n - len(self.outputs)]
        a = jnp.zeros(lead + self.inputs + (rank,), param_dtype)
        b = jnp.zeros(lead + (rank,) + self.outputs, param_dtype)
        self.lora_a = nnx.Param(a, axes=axes[:n] + ("rank",))
        self.lora_b = nnx.Param(b, axes=("rank",) + axes[n:])
        self.lora_rank, self.lora_scale = rank, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.inputs)]
        width, out = math.prod(self.inputs), math.prod(self.outputs)
        flat = x.reshape(math.prod(lead), width).astype(self.dtype)
        y = flat @ self.kernel[...].astype(self.dtype).reshape(width, out)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(out)
        if self.lora_a is not None:
            a = self.lora_a[...].astype(self.dtype).reshape(width, self.lora_rank)
            b = self.lora_b[...].astype(self.dtype).reshape(self.lora_rank, out)
            y = y + ((flat @ a) * self.lora_scale) @ b
        return y.reshape(lead + self.outputs)


class RMSNorm(nnx.Module):
    """Root mean square norm: float32 inside, back to x's dtype, then the weight."""

    def __init__(self, size: int, eps: float, *, param_dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Rows flattened: the gradient of `scale`, a sum over rows, is nine times faster (CPU).
        wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (self.scale[...].astype(x.dtype) * normal.astype(x.dtype)).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Mean and variance norm with a bias: float32 inside, then back to x's dtype."""

    def __init__(self, size: int, eps: float, *, param_dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normal * scale + bias).astype(x.dtype)


class Embedding(nnx.Module):
    """The token table; also the output head when the two are tied."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: str, param_dtype: str):
        self.dtype = dtype
        table = jax.random.normal(rngs.params(), (vocab, size), jnp.float32) / math.sqrt(size)
        self.table = nnx.Param(table.astype(param_dtype), axes=("vocab", "embed"))

    @property
    def parts(self) -> tuple[jax.Array, ...]:
        """The table [V, D], in parts where it was cut (see `apart.unstack`)."""
        table = self.table.get_value()
        return table if isinstance(table, tuple) else (table,)

    def __call__(self, ids: jax.Array) -> jax.Array:
        parts = self.parts
        if len(parts) == 1:
            return jnp.take(parts[0], ids, axis=0, mode="clip").astype(self.dtype)
        ids = jnp.clip(ids, 0, sum(len(part) for part in parts) - 1)
        out, start = 0, 0
        for part in parts:  # each id is in one of them
            at = jnp.where(ids < start, len(part), ids - start)
            out = out + part.at[at].get(mode="fill", fill_value=0)
            start += len(part)
        return out.astype(self.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        size: int,
        intermediate: int,
        *,
        rngs: nnx.Rngs,
        bias: bool,
        out_scale: float,
        place,
        dtype: str,
        param_dtype: str,
    ):
        kinds = {"rngs": rngs, "bias": bias, "dtype": dtype, "param_dtype": param_dtype}
        self.place = place
        self.gate = Dense((size,), (intermediate,), ("embed", "mlp"), **kinds)
        self.up = Dense((size,), (intermediate,), ("embed", "mlp"), **kinds)
        self.down = Dense((intermediate,), (size,), ("mlp", "embed"), scale=out_scale, **kinds)

    def __call__(self, x: jax.Array, *axes: str) -> jax.Array:
        """`axes` are the logical axes of x before its last one."""
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(self.place(inner, *axes, "mlp"))
