"""Rotary angles far from the start, where the last bit of a frequency shows."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as original

from mmsr_jax.model import rope
from mmsr_jax.model.config import preset
from mmsr_jax.weights import hf_config


@pytest.fixture(scope="module")
def config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(**hf_config.flat(preset("7b"), "float32"))


def test_angles_of_text_at_its_longest(config):
    """Sections are cut from the original's table here: it does so when it turns the queries."""
    text = preset("7b").text
    where = np.random.default_rng(0).integers(0, 32_000, (3, 2, 400)).astype(np.int32)
    found = rope.text_angles(jnp.asarray(where), text.head_dim, text.rope_theta, text.mrope_section)
    module = original.Qwen2_5_VLRotaryEmbedding(config.text_config)
    frequencies = module.inv_freq.double().numpy()
    axis = np.repeat(np.arange(3), text.mrope_section)
    angles = where.transpose(1, 2, 0)[..., axis].astype(np.float64) * frequencies
    for ours, theirs in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        # A float32 angle of 32,000 is exact to 0.001; and a wrong last bit adds 0.002.
        assert np.abs(np.asarray(ours) - theirs).max() < 1.1e-3


def test_frequencies_are_the_originals(config):
    """But for one or two of them by their last bit: torch's power is not rounded exactly."""
    text = original.Qwen2_5_VLRotaryEmbedding(config.text_config).inv_freq
    patch = original.Qwen2_5_VLVisionRotaryEmbedding(config.vision_config).inv_freq
    for theirs, size, theta in ((text, 128, 1e6), (patch, 40, 1e4)):
        ours = rope.frequencies(size, theta)
        assert ours.dtype == np.float32 and theirs.dtype == torch.float32
        assert (ours == theirs.numpy()).mean() > 0.9
        assert 32_000 * np.abs(ours - theirs.numpy()).max() < 1e-4
