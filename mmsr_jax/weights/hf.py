"""Published checkpoints in safetensors: `load` reads one into our tree, `save` writes one."""

from mmsr_jax.weights.hf_read import Loaded, load
from mmsr_jax.weights.hf_write import save

__all__ = ["Loaded", "load", "save"]
