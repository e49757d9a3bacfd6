"""Attention: one function, several implementations, XLA the reference.

`bind` is what the towers call: it chooses by platform and shape and gives a function of q, k, v.
`bind_cached` does the same for new tokens that look at the cache while decoding and prefilling.
"""

from mmsr_jax.model.attention.cached import bind_cached
from mmsr_jax.model.attention.dispatch import bind
from mmsr_jax.model.attention.xla import attend, attend_cached, segment_mask

__all__ = ["attend", "attend_cached", "bind", "bind_cached", "segment_mask"]
