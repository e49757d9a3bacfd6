"""One device and a mesh of eight give the same numbers."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import preset
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import ROLLOUT_RULES, TRAIN_RULES, sharding, spec

PROGRAM = """
import dataclasses, functools, jax, jax.numpy as jnp, numpy as np
from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl as m
from mmsr_jax.model.config import preset
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import ROLLOUT_RULES
from mmsr_jax.types import Picture

tiny = preset("tiny")
config = dataclasses.replace(
    tiny,
    text=dataclasses.replace(tiny.text, layers=2, tied=False),
    vision=dataclasses.replace(tiny.vision, depth=2, full_attention_layers=(1,)),
)
rng = np.random.default_rng(0)
grids = (1, 4, 6), (1, 6, 10)
pictures = [Picture(rng.normal(size=(h * w, 1176)).astype("f"), (t, h, w)) for t, h, w in grids]
B, T = 4, 24
index = np.full((B, T), -1, np.int32)
index[0, 2:8], index[3, 4:19] = np.arange(6), 6 + np.arange(15)
inputs = m.Inputs(
    rng.integers(20, 500, (B, T)).astype(np.int32),
    np.broadcast_to(np.arange(T, dtype=np.int32), (3, B, T)).copy(),
    np.ones((B, T), np.int32),
    index,
    layout.vision_inputs(pictures, config.vision),
)

def step(mesh):
    graph, shapes = m.abstract(config, mesh)
    params = m.init(config, jax.random.key(0), mesh)
    def loss(params):
        return jnp.sin(m.forward(graph, params, inputs).logits).mean()
    return shapes, params, jax.jit(jax.value_and_grad(loss))(params)

assert jax.device_count() == 8
_, alone, (loss, gradient) = step(None)
mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2))
assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2}
shapes, spread, (loss8, gradient8) = step(mesh)
def same_layout(shape, array):
    assert array.sharding.is_equivalent_to(shape.sharding, array.ndim), (shape, array.sharding)
jax.tree.map(same_layout, shapes, spread)
q = spread["text"]["layers"]["attention"]["q"]["kernel"]
assert q.addressable_shards[0].data.shape == (2, 32, 2, 32), q.sharding
jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), alone, spread)
np.testing.assert_allclose(loss8, loss, atol=1e-5)
def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-3, float(np.abs(a).max())))
jax.tree.map(close, jax.device_get(gradient), jax.device_get(gradient8))

graph, rollout = m.abstract(config, mesh, ROLLOUT_RULES)
params = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), spread, rollout)
features = jax.jit(m.encode_images, static_argnums=0)(graph, params, inputs.vision)
text = dataclasses.replace(inputs, vision=None)
cache = m.init_cache(config, B, 40, mesh)
assert cache.k.sharding.spec[1] == "fsdp" and cache.k.sharding.spec[3] == "tensor"
out = jax.jit(m.forward, static_argnums=0)(graph, params, text, cache, features=features)
one = jax.jit(m.forward, static_argnums=0)(m.abstract(config)[0], alone, inputs)
np.testing.assert_allclose(out.logits, one.logits, atol=1e-5)
assert out.cache.k.sharding.spec[1] == "fsdp", out.cache.k.sharding
print("same")
"""


def test_eight_devices_equal_one():
    # Cached programs with several CPU devices can deadlock: no persistent cache here.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # nearly all of the time is compilation
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same" in done.stdout


def test_mesh_sizes():
    device = jax.devices()[:1]
    mesh = make_mesh(MeshConfig(), device)
    assert dict(mesh.shape) == {"fsdp": 1, "tensor": 1}
    eight = device * 8  # only counted before the mesh is made
    with pytest.raises(ValueError, match="8 devices do not divide by 3"):
        make_mesh(MeshConfig(fsdp=-1, tensor=3), eight)
    with pytest.raises(ValueError, match="asks for 4 devices, there are 8"):
        make_mesh(MeshConfig(fsdp=2, tensor=2), eight)
    for wrong in (MeshConfig(fsdp=-1, tensor=-1), MeshConfig(fsdp=0), MeshConfig(tensor=-2)):
        with pytest.raises(ValueError, match="positive"):
            make_mesh(wrong, eight)


def test_a_mesh_axis_is_used_once():
    assert spec(("batch", "length", "embed"), TRAIN_RULES) == P("fsdp", None, None)
    assert spec(("embed", "heads", "head"), TRAIN_RULES) == P("fsdp", "tensor", None)
    assert spec(("embed", None, "mlp"), ROLLOUT_RULES) == P(None, None, "tensor")
    with pytest.raises(ValueError, match="'depth'"):
        spec(("depth",), TRAIN_RULES)


def test_an_axis_that_does_not_divide_is_left_whole(caplog):
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    with caplog.at_level("INFO"):
        placed = sharding(mesh, TRAIN_RULES, ("embed", "kv_heads", "head"), (64, 2, 8))
    assert placed.spec == P("fsdp", None, None)
    assert "kv_heads" in caplog.text and "tensor=4" in caplog.text
    with pytest.raises(ValueError, match="2 axes"):
        sharding(mesh, TRAIN_RULES, ("embed", "mlp"), (64,))


def test_published_sizes_have_a_layout():
    mesh = jax.sharding.AbstractMesh((8, 8), ("fsdp", "tensor"))
    _, shapes = qwen2_5_vl.abstract(preset("7b"), mesh)
    text, vision = shapes["text"]["layers"], shapes["vision"]["layers"]
    assert text["mlp"]["gate"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    # 28 query heads and a vision mlp of 3420 do not divide by 8.
    assert text["attention"]["q"]["kernel"].sharding.spec == P(None, "fsdp", None, None)
    assert vision["mlp"]["gate"]["kernel"].sharding.spec == P(None, "fsdp", None)
