"""A model of published proportions (heads as wide as hidden / heads), all sizes different."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig, preset


class Plain:
    """Sizes and weights."""

    @functools.cached_property
    def model(self) -> ModelConfig:
        base = preset("tiny")
        return dataclasses.replace(
            base,
            text=dataclasses.replace(
                base.text, vocab_size=384, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=12,
                intermediate=80, mrope_section=(2, 2, 2),
            ),
            vision=dataclasses.replace(
                base.vision, depth=3, hidden=32, heads=2, intermediate=56, out_hidden=48,
                full_attention_layers=(1,),
            ),
        )  # fmt: skip

    def params(self, seed: int = 0, config: ModelConfig | None = None) -> dict:
        """Normal numbers: no norm one, no bias zero."""
        rng = np.random.default_rng(seed)
        shapes = qwen.abstract(config or self.model)[1]
        drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        return jax.device_put(drawn, jax.devices()[0])


@pytest.fixture(scope="session")
def plain() -> Plain:
    return Plain()
