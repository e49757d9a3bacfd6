"""The one record that the update sees.

Letters: `B` rows, `T` tokens a row. Several conversations may share a row (packing); they are
told apart by `inputs.segments` and never attend to one another.
"""

import dataclasses

import jax

from mmsr_jax.model.qwen2_5_vl import Inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Entry t of every array but `inputs` speaks of the token that follows token t."""

    inputs: Inputs
    targets: jax.Array  # [B, T] int32, the next token of the same conversation
    mask: jax.Array  # [B, T] float32, 1 where the model is the next token's author
    weights: jax.Array  # [B, T] float32, its weight in the loss (0 where mask is 0)
    advantages: jax.Array  # [B, T] float32, of its trajectory (0 in SFT)
    sampler_logprobs: jax.Array  # [B, T] float32, what the sampler said
    old_logprobs: jax.Array | None = None  # [B, T] float32; None: the current policy's own
