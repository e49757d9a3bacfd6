"""Every implementation of attention against the reference, forward and gradients."""

import dataclasses
import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.attention import attend, bind, choose, cudnn, segment_mask, splash, triton
from mmsr_jax.model.attention.dispatch import kv_copies
from mmsr_jax.model.config import preset
from mmsr_jax.parallel.rules import Placement
from mmsr_jax.types import Picture

# (positions, query heads, key-value heads, head width, causal)
CASES = [(256, 4, 2, 32, True), (100, 6, 2, 80, True), (150, 2, 2, 80, False), (40, 4, 1, 16, True)]
ON_GPU = jax.default_backend() == "gpu"


def example(length, heads, kv_heads, size, causal, dtype="float32", packed=True):
    """q, k, v, segments of three rows: packed, half empty, full; and a weight for each output."""
    rng = np.random.default_rng(length)

    def draw(count):
        return jnp.asarray(rng.normal(size=(3, length, count, size)), dtype)

    segments = np.ones((3, length), np.int32)
    if causal and packed:
        segments[0] = 1 + np.arange(length) // (length // 3)
    segments[1, length // 2 :] = 0
    weight = draw(heads) * (segments > 0)[:, :, None, None]  # what padding sees is not defined
    return draw(heads), draw(kv_heads), draw(kv_heads), jnp.asarray(segments), weight


def value_and_gradients(function, q, k, v, segments, weight):
    def total(q, k, v):
        out = function(q, k, v, segments)
        return (out * weight).astype(jnp.float32).sum(), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(q, k, v)
    return out * (segments > 0)[:, :, None, None], *gradients


def reference(q, k, v, segments, causal):
    mask = segment_mask(segments) if causal else (segments[:, :, None] == segments[:, None, :])
    return attend(q, k, v, mask)


def equal_to_the_reference(kernel, case, tolerance, **options):
    arrays = example(*case, **options)
    found = value_and_gradients(functools.partial(kernel, causal=case[-1]), *arrays)
    exact = [x.astype(jnp.float32) if x.dtype != jnp.int32 else x for x in arrays]
    wanted = value_and_gradients(functools.partial(reference, causal=case[-1]), *exact)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), err_msg=name)
        assert np.abs(other).max() > 0.1, name


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_reference(case):
    equal_to_the_reference(functools.partial(splash.attend, interpret=True), case, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference(case):
    equal_to_the_reference(functools.partial(triton.attend, interpret=True), case, 2e-6)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN and compiled Triton need a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [cudnn.attend, triton.attend])
def test_kernels_on_gpu_equal_the_reference(kernel, case, packed):
    equal_to_the_reference(kernel, case, 2e-2, dtype="bfloat16", packed=packed)
