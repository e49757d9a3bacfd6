"""Published sizes, and configs that cannot be."""

import dataclasses
import math

import jax
import pytest

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import preset


@pytest.mark.parametrize(
    "name, total, vision",  # qwen25vl.md 1.5
    [
        ("3b", 3_754_622_976, 668.7),
        ("7b", 8_292_166_656, 676.6),
        ("32b", 33_452_718_336, 688.8),
        ("72b", 73_410_777_344, 704.6),
    ],
)
def test_parameter_counts_of_published_sizes(name, total, vision):
    _, shapes = qwen2_5_vl.abstract(preset(name))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == total
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["vision"]))
    assert round(count / 1e6, 1) == vision


def test_tiny_is_about_a_million():
    _, shapes = qwen2_5_vl.abstract(preset("tiny"))
    assert 0.8e6 < sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) < 1.3e6


def test_sizes_that_clash_are_named():
    config = preset("tiny")
    with pytest.raises(ValueError, match="4 heads do not divide by 3"):
        dataclasses.replace(config.text, kv_heads=3)
    with pytest.raises(ValueError, match="sums to 6, half of head_dim 32"):
        dataclasses.replace(config.text, mrope_section=(2, 2, 2))
    with pytest.raises(ValueError, match="out_hidden 128 is not text hidden 64"):
        dataclasses.replace(config, text=dataclasses.replace(config.text, hidden=64))
    with pytest.raises(ValueError, match="beyond depth 3"):
        dataclasses.replace(config.vision, full_attention_layers=(3,))
    with pytest.raises(ValueError, match="window_size 100"):
        dataclasses.replace(config.vision, window_size=100)
    with pytest.raises(ValueError, match="no preset '8b'"):
        preset("8b")


def test_ids_that_are_never_sampled():
    tiny = preset("tiny")
    assert not tiny.unsampled.any() and tiny.unsampled.shape == (512,)
    config = dataclasses.replace(tiny, unsampled_ids=(12, 9), sampled_vocab=500)
    assert config.unsampled.nonzero()[0].tolist() == [9, 12, *range(500, 512)]
    for wrong, message in (
        ({"unsampled_ids": (3, 512)}, r"\[512\] are no ids of a vocabulary of 512"),
        ({"sampled_vocab": 513}, "sampled_vocab 513 is not within 0 and 512"),
        ({"unsampled_ids": (2,)}, "eos_token_id 2 is unsampled"),
        ({"sampled_vocab": 2}, "eos_token_id 2 is unsampled"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny, **wrong)
