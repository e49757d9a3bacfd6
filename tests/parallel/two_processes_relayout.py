"""Run by test_relayout.py twice at a time: training spans both, each gets a copy of its own.

Arguments: the coordinator's port, the number of this process.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
port, rank = int(sys.argv[1]), int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

import dataclasses  # noqa: E402

import numpy as np  # noqa: E402

from mmsr_jax.build import Job  # noqa: E402
from mmsr_jax.experiment import Experiment  # noqa: E402
from mmsr_jax.model import qwen2_5_vl as qwen  # noqa: E402
from mmsr_jax.model.config import preset  # noqa: E402
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from mmsr_jax.parallel.relayout import relayout  # noqa: E402
from mmsr_jax.parallel.rules import ROLLOUT_RULES  # noqa: E402


def value(path, leaf) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(size=leaf.shape).astype(leaf.dtype)


def spread(path, leaf) -> jax.Array:
    whole = value(path, leaf)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])


tiny = preset("tiny")
model = dataclasses.replace(
    tiny,
    text=dataclasses.replace(tiny.text, layers=2),
    vision=dataclasses.replace(tiny.vision, depth=2, full_attention_layers=(1,)),
)
assert jax.process_count() == 2 and jax.device_count() == 4
for config in (MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=1, tensor=4)):
    mesh = make_mesh(config)
    job = Job(Experiment("e", mesh=config), "unused")
    own = job.rollout_mesh
    assert set(own.devices.flat) == set(jax.local_devices())
    assert own.shape["tensor"] == min(config.tensor, 2)
    shapes = qwen.abstract(model, mesh)[1]
    params = jax.tree_util.tree_map_with_path(spread, shapes)
    assert not jax.tree.leaves(params)[0].is_fully_addressable
    local = qwen.abstract(model, own, ROLLOUT_RULES)[1]
    for chunk in (20_000, 1 << 28):
        found = relayout(params, local, chunk_bytes=chunk)
        for (path, leaf), shape in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(local), strict=True
        ):
            assert leaf.is_fully_addressable
            assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, value(path, shape))
    # In its own time, without the other process: one process runs more steps than the other.
    for _ in range(1 + 2 * rank):
        total = jax.jit(lambda tree: sum(x.sum() for x in jax.tree.leaves(tree)))(found)
    assert np.isfinite(total)
print(f"all arrived at {rank}", flush=True)
