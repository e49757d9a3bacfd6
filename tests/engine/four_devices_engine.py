"""Run by test_engine_mesh.py in a process with four devices: the engine on rollout meshes."""

import jax
import numpy as np
import pytest

from mmsr_jax.engine.engine import Engine
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.parallel import compiles
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import ROLLOUT_RULES


@pytest.mark.parametrize(("fsdp", "tensor"), [(4, 1), (2, 2)])
def test_a_mesh_says_what_one_device_says(tiny, plans, play, same, fsdp, tensor):
    expected = play(tiny.engine(), plans, samples=2)
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
    graph, shapes = qwen.abstract(tiny.model, mesh, ROLLOUT_RULES)
    params = jax.tree.map(
        lambda p, s: jax.device_put(np.asarray(p), s.sharding), tiny.params(), shapes
    )
    engine = Engine(graph, tiny.model, tiny.engine_config, (), mesh)
    engine.set_params(params)
    engine.warm_up()
    before = compiles.count()
    for left, right in zip(play(engine, plans, samples=2), expected, strict=True):
        same(left, right, 1e-5)
    assert compiles.count() == before
    # The pool stays where it was laid: heads over `tensor`, whole along `fsdp`.
    kv = engine.device.kv
    part = kv.addressable_shards[0].data.shape
    assert part == (*kv.shape[:2], kv.shape[2] // tensor, kv.shape[3])
