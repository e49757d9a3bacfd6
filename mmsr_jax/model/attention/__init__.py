"""Attention: one function, several implementations, XLA the reference.

`bind` is what the towers call: it chooses by platform and shape and gives a function of q, k, v.
`attend_cached` reads the cache while decoding and prefilling; it is XLA everywhere, whatever
`ModelConfig.attention` says: a decoding step is bound by reading the cache, not by its products.
"""

from mmsr_jax.model.attention.dispatch import bind
from mmsr_jax.model.attention.xla import attend, attend_cached, segment_mask

__all__ = ["attend", "attend_cached", "bind", "segment_mask"]
