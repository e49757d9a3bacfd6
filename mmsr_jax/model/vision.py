"""The vision tower: window attention in most layers, whole frames in a few.

Patches keep their natural order from pixels to merged tokens. A layer gathers queries, keys and
values into groups (windows or frames), attends within each group, and gathers the result back:
nothing as large as patches x patches ever exists, and which patch sits in which group is data.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmsr_jax.model import rope
from mmsr_jax.model.attention import bind
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.model.layers import Dense, GatedMLP, RMSNorm
from mmsr_jax.parallel.rules import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionInputs:
    """Patches of all pictures, one after another, and the plan of their groups.

    Padding entries of `windows` and `frames` are P, padding patches have a slot past the end:
    both out of range, filled with zeros on gathering.
    """

    patches: jax.Array  # [P, patch_dim] float32
    hw: jax.Array  # [P, 2] int32 row and column within the picture
    windows: jax.Array  # [W, Lw] int32 patches of each window
    frames: jax.Array  # [F, Lf] int32 patches of each frame
    window_slot: jax.Array  # [P] int32 place of a patch in windows, flattened
    frame_slot: jax.Array  # [P] int32 place of a patch in frames, flattened


@jax.custom_vjp
def regroup(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows x[index], zeros where the index is out of range; `inverse` undoes it.

    No row is taken twice, so the gradient is a gather by `inverse`: scatters are slow everywhere.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _regroup_forward(x, index, inverse):
    return regroup(x, index, inverse), (index, inverse)


def _regroup_backward(plan, gradient):
    index, inverse = plan
    return regroup(gradient, inverse, index), None, None


regroup.defvjp(_regroup_forward, _regroup_backward)


def _attend_grouped(
    qkv: jax.Array, groups: jax.Array, slot: jax.Array, config: ModelConfig, place: Placement
) -> jax.Array:
    """qkv [P, 3, N, H] attended within groups [G, S]: [P, N, H]."""
    patches, _, heads, size = qkv.shape
    grouped = regroup(qkv.reshape(patches, -1), groups.reshape(-1), slot)
    grouped = grouped.reshape(groups.shape + (3, heads, size))
    attention = bind(
        config.attention,
        groups < patches,
        causal=False,
        head_dim=size,
        dtype=config.dtype,
        place=place,
        rows="patches",
    )
    out = attention(grouped[:, :, 0], grouped[:, :, 1], grouped[:, :, 2])
    out = regroup(out.reshape(-1, heads * size), slot, groups.reshape(-1))
    return out.reshape(patches, heads, size)


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP, all with biases."""

    def __init__(self, config: ModelConfig, place: Placement, *, rngs: nnx.Rngs):
        vision = config.vision
        kinds = {"rngs": rngs, "dtype": config.dtype, "param_dtype": config.param_dtype}
        heads, out_scale = (vision.heads, vision.head_dim), (2 * vision.depth) ** -0.5
        self.config, self.place = config, place
        self.norm1 = RMSNorm(vision.hidden, vision.norm_eps, param_dtype=config.param_dtype)
        self.qkv = Dense(
            (vision.hidden,), (3,) + heads, ("embed", None, "heads", "head"), bias=True, **kinds
        )
        self.proj = Dense(
            heads,
            (vision.hidden,),
            ("heads", "head", "embed"),
            bias=True,
            scale=out_scale,
            **kinds,
        )
        self.norm2 = RMSNorm(vision.hidden, vision.norm_eps, param_dtype=config.param_dtype)
        self.mlp = GatedMLP(
            vision.hidden,
            vision.intermediate,
            bias=True,
            out_scale=out_scale,
            place=place,
            **kinds,
        )

    def __call__(self, x, turn, inputs: VisionInputs, whole_frame: jax.Array | bool) -> jax.Array:
        qkv = self.place(self.qkv(self.norm1(x)), "patches", None, "heads", "head")
        # Rotation in float32 whatever the compute dtype is, as in the original.
        turned = rope.rotate(qkv[:, :2], turn[0][:, None], turn[1][:, None]).astype(qkv.dtype)
        qkv = jnp.concatenate([turned, qkv[:, 2:]], axis=1)
        kinds = (
            lambda qkv: self._attend(qkv, inputs.frames, inputs.frame_slot),
            lambda qkv: self._attend(qkv, inputs.windows, inputs.window_slot),
        )
        if isinstance(whole_frame, bool):
            attended = kinds[0 if whole_frame else 1](qkv)
        else:
            attended = jax.lax.cond(whole_frame, *kinds, qkv)
        x = x + self.place(self.proj(attended), "patches", "embed")
        return x + self.place(self.mlp(self.norm2(x), "patches"), "patches", "embed")

    def _attend(self, qkv, groups, slot):
        return _attend_grouped(qkv, groups, slot, self.config, self.place)


class Merger(nnx.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.vision
        kinds = {
            "rngs": rngs,
            "bias": True,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
        }
        self.width = vision.hidden * vision.merge_size**2
        self.norm = RMSNorm(vision.hidden, vision.norm_eps, param_dtype=config.param_dtype)
        self.inner = Dense((self.width,), (self.width,), ("embed", "mlp"), **kinds)
        self.outer = Dense((self.width,), (vision.out_hidden,), ("mlp", "embed"), **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x).reshape(-1, self.width)
        return self.outer(jax.nn.gelu(self.inner(x), approximate=False))


class VisionModel(nnx.Module):
    """Patches [P, patch_dim] to features [P / merge_size^2, out_hidden]."""

    def __init__(self, config: ModelConfig, place: Placement, *, rngs: nnx.Rngs):
        vision = config.vision
        self.config, self.place = config, place
        self.patch = Dense(
            (vision.patch_dim,),
            (vision.hidden,),
            (None, "embed"),
            rngs=rngs,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )

        @nnx.vmap
        def stacked(key):
            return VisionLayer(config, place, rngs=nnx.Rngs(params=key))

        self.layers = stacked(jax.random.split(rngs.params(), vision.depth))
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, inputs: VisionInputs, apart: tuple[dict, ...] | None = None) -> jax.Array:
        """`apart` are the parameters of the layers one by one, used instead of the stack."""
        vision = self.config.vision
        x = self.place(self.patch(inputs.patches), "patches", "embed")
        turn = rope.patch_angles(inputs.hw, vision.head_dim, vision.rope_theta)
        graph, params = nnx.split(self.layers)
        whole_frame = jnp.isin(jnp.arange(vision.depth), jnp.asarray(vision.full_attention_layers))

        def body(x, scanned):
            layer_params, whole = scanned
            return nnx.merge(graph, layer_params)(x, turn, inputs, whole), None

        def kept(body):
            # As in the text model: outside a loop XLA would undo the recomputation.
            remat = self.config.remat
            return jax.checkpoint(body, prevent_cse=apart is not None) if remat else body

        if apart is None:
            return self.merger(jax.lax.scan(kept(body), x, (params, whole_frame))[0])
        for index, layer_params in enumerate(apart):
            whole = index in vision.full_attention_layers
            layer = kept(lambda x, layer_params, whole=whole: body(x, (layer_params, whole))[0])
            x = layer(x, layer_params)
        return self.merger(x)
