"""Run by test_step_mesh.py in a process with eight devices, to find what one device found."""

import os
import pathlib

import jax
import numpy as np
import pytest

from mmsr_jax.model import lora
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.parallel import compiles
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.train import grpo, step
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.assemble import assemble

CONFIG = grpo.LossConfig(kl_weight=0.1)
LORA = lora.LoRAConfig(
    rank=3, alpha=3.0, targets=("q_proj", "k_proj", "down_proj", "qkv"), vision=True
)
TEMPERATURE = np.float32(1)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


@pytest.fixture(scope="module")
def laid(tiny, mesh):
    """The graph that computes on the mesh, and params(seed) -> weights laid out over it."""
    graph, shapes = qwen.abstract(tiny.model, mesh)

    def params(seed=0):
        return jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), tiny.params(seed), shapes)

    return graph, params


def expected(name):
    return dict(np.load(pathlib.Path(os.environ["EXPECTED"]) / f"{name}.npz"))


def assert_found_again(name, grads, measured):
    wanted = expected(name)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for n, (path, leaf) in enumerate(leaves):
        right = wanted[f"g{n}"]
        scale = max(np.abs(right).max(), 1e-3)
        gap = np.abs(np.asarray(leaf) - right).max() / scale
        assert gap < 1e-5, f"{jax.tree_util.keystr(path)}: {gap:.1e}"
    for key, value in measured.items():
        assert float(value) == pytest.approx(float(wanted[f"m_{key}"]), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_loss_and_gradients(tiny, pieces, laid, name):
    assert jax.device_count() == 8
    graph, params = laid
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    weights = params()
    grads = step.zeros_like(weights)
    if name == "sft":
        grads, measured = step.accumulate_sft(graph, weights, grads, batch)
    else:
        grads, measured = step.accumulate_grpo(
            graph, weights, params(1), grads, batch, CONFIG, TEMPERATURE
        )
    for gradient, weight in zip(jax.tree.leaves(grads), jax.tree.leaves(weights), strict=True):
        assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)
    assert_found_again(name, grads, measured)


def test_an_adapter_on_frozen_weights(tiny, pieces, laid, mesh):
    """Drawn on the mesh as on one device; gradients and moments lie where the adapter lies."""
    plain, params = laid
    base = params()
    graph, shapes = qwen.abstract(tiny.model, mesh, lora=LORA)
    shapes = lora.split(shapes)[1]
    adapter = lora.init(shapes, jax.random.key(3))
    adapter = jax.tree.map(lambda x: x + 0.02, adapter)
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    grads, measured = step.accumulate_grpo(
        graph, adapter, base, step.zeros_like(adapter), batch, CONFIG, TEMPERATURE, base, plain
    )
    assert_found_again("lora", grads, measured)
    state = state_lib.create(adapter, tiny.transform, mesh)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    places = [s.sharding for s in jax.tree.leaves(shapes)]
    held = jax.tree.leaves(adapter) + jax.tree.leaves(grads) + moments
    for leaf, place in zip(held, 4 * places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert any(not place.is_fully_replicated for place in places)
    merged = lora.merge(lora.join(base, adapter), LORA)
    for leaf, weight in zip(jax.tree.leaves(merged), jax.tree.leaves(base), strict=True):
        assert leaf.sharding.is_equivalent_to(weight.sharding, leaf.ndim)


def test_moments_lie_where_their_weights_lie_and_nothing_recompiles(tiny, pieces, laid, mesh):
    graph, params = laid
    state = state_lib.create(params(), tiny.transform, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    counts = []
    for _ in range(4):
        grads = step.zeros_like(state.params)
        grads, _ = step.accumulate_sft(graph, state.params, grads, batch)
        state, _ = step.apply(tiny.transform, state, grads)
        counts.append(compiles.count())
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    assert counts[1] == counts[3], counts
