"""Run by test_checkpoint.py in a process with eight devices: what one device saved is restored."""

import os

import jax
import numpy as np

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.train import state as state_lib
from mmsr_jax.weights.checkpoint import CheckpointConfig, Checkpoints


def test_restored_onto_a_mesh(tiny):
    assert jax.device_count() == 8
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shapes = qwen.abstract(tiny.model, mesh)[1]
    given = tiny.params()
    params = jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), given, shapes)
    zeros = jax.tree.map(lambda p: p * 0, params)
    target = state_lib.abstract(state_lib.create(zeros, tiny.transform, mesh))
    with Checkpoints(os.environ["CHECKPOINTS"], CheckpointConfig()) as checkpoints:
        state, meta = checkpoints.restore(target)
        assert meta == {"step": 1}
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == wanted.sharding
        for leaf, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(given), strict=True):
            np.testing.assert_array_equal(leaf, wanted)
        kernel = state.params["text"]["layers"]["mlp"]["gate"]["kernel"]
        assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // 8}
        checkpoints.save(2, state, {"step": 2})
