"""Pictures to vectors by a model with weights: what `tools` may not do, since it knows no jax."""

from mmsr_jax.embed.choose import EMBEDDERS, embedder

__all__ = ["EMBEDDERS", "embedder"]
