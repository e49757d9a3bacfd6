"""The published sizes on meshes: bytes a chip by arithmetic, and by the TPU compiler.

The compiled ones are slow and need libtpu (extra `tpu`), no TPU:

    python -m pytest tests/model/test_sizes.py -m slow -s
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from mmsr_jax.inputs.layout import most_windows
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import preset
from mmsr_jax.parallel import topology
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.parallel.rules import ROLLOUT_RULES, TRAIN_RULES, Placement
from mmsr_jax.parallel.topology import GIB, compile_for, shard_bytes, topology_mesh
from mmsr_jax.train.batch import TrainBatch
from mmsr_jax.train.step import accumulate_sft

# Parameters (qwen25vl.md 1.5), and those that no axis splits: norms and biases of a width.
TOTALS = {
    "3b": 3_754_622_976,
    "7b": 8_292_166_656,
    "32b": 33_452_718_336,
    "72b": 73_410_777_344,
}


@pytest.mark.parametrize("name", TOTALS)
def test_every_chip_holds_its_share_of_the_parameters(name):
    config = preset(name)
    for fsdp, tensor in ((8, 1), (4, 4), (64, 1)):
        _, shapes = qwen.abstract(config, AbstractMesh((fsdp, tensor), ("fsdp", "tensor")))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == TOTALS[name]
        share = 4 * TOTALS[name] / (fsdp * tensor)  # float32
        # Not all is split: norms, biases; key heads where there are fewer than tensor shards.
        assert share <= shard_bytes(shapes) < 1.05 * share


@pytest.mark.parametrize(
    "name, tensor, whole",
    [
        ("3b", 4, {"k", "v"}),  # 2 key heads
        ("7b", 8, {"q", "k", "v", "o", "vision mlp"}),  # 28 heads; 4 key heads; 3420
        ("32b", 8, set()),
        ("72b", 8, set()),
        ("72b", 16, {"k", "v"}),
    ],
)
def test_what_a_tensor_axis_cannot_split_is_whole(name, tensor, whole):
    mesh = AbstractMesh((2, tensor), ("fsdp", "tensor"))
    _, shapes = qwen.abstract(preset(name), mesh)
    attention = shapes["text"]["layers"]["attention"]
    kernels = {key: attention[key]["kernel"] for key in "qkvo"}
    kernels["mlp"] = shapes["text"]["layers"]["mlp"]["up"]["kernel"]
    kernels["vision mlp"] = shapes["vision"]["layers"]["mlp"]["up"]["kernel"]
    found = {key for key, leaf in kernels.items() if "tensor" not in leaf.sharding.spec}
    assert found == whole


def test_a_rollout_layout_keeps_the_width_whole():
    mesh = AbstractMesh((4, 4), ("fsdp", "tensor"))
    train, rollout = (
        shard_bytes(qwen.abstract(preset("32b"), mesh, rules)[1])
        for rules in (TRAIN_RULES, ROLLOUT_RULES)
    )
    assert 3.8 * train < rollout < 4.2 * train


def training_shapes(config, mesh, rows, length, patches):
    """A micro-batch of `rows` packed rows with one picture of `patches` patches in each."""
    place = Placement(mesh)

    def array(dtype, shape, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place.of(axes, shape))

    tokens = array(jnp.int32, (rows, length), "batch", "length")
    floats = array(jnp.float32, (rows, length), "batch", "length")
    total, vision = rows * patches, config.vision
    windows = most_windows(total, rows, patches, vision)
    pictures = qwen.VisionInputs(
        patches=array(jnp.float32, (total, vision.patch_dim), "patches", None),
        hw=array(jnp.int32, (total, 2), "patches", None),
        windows=array(jnp.int32, (windows, 64), "patches", None),
        frames=array(jnp.int32, (rows, patches), "patches", None),
        window_slot=array(jnp.int32, (total,), "patches"),
        frame_slot=array(jnp.int32, (total,), "patches"),
    )
    positions = array(jnp.int32, (3, rows, length), None, "batch", "length")
    inputs = qwen.Inputs(tokens, positions, tokens, tokens, pictures)
    return TrainBatch(inputs, tokens, floats, floats, floats, floats)


@pytest.mark.slow
@pytest.mark.skipif(
    not topology.has_libtpu(), reason='the TPU compiler needs libtpu: pip install "mmsr-jax[tpu]"'
)
@pytest.mark.parametrize(
    "name, chips, fsdp, tensor, rows",
    [
        ("3b", "v5e:2x4", 8, 1, 8),
        ("7b", "v5p:2x2x1", 4, 1, 8),
        ("7b", "v6e:4x4", 4, 4, 16),
        ("32b", "v5p:2x2x2", 8, 1, 8),
        ("72b", "v5p:2x2x4", 16, 1, 16),
    ],
)
def test_a_training_step_compiles_and_fits(name, chips, fsdp, tensor, rows):
    """Forward and backward of the SFT loss onto the gradients so far, as `train.step` does it."""
    config, mesh = preset(name), topology_mesh(chips, MeshConfig(fsdp, tensor))
    graph, shapes = qwen.abstract(config, mesh)
    batch = training_shapes(config, mesh, rows, length=4096, patches=1024)

    def step(params, gradients, batch):
        return accumulate_sft(graph, params, gradients, batch)

    found = compile_for(mesh, step, shapes, shapes, batch, donate=(1,))
    adam = found.bytes + 2 * shard_bytes(shapes)  # kept through the step, not touched by it
    print(
        f"\n| {name} | {chips} | {fsdp} x {tensor} | {rows} x 4096 | "
        f"{found.argument_bytes / GIB:.1f} | {found.temporary_bytes / GIB:.1f} | "
        f"**{found.bytes / GIB:.1f}** | {adam / GIB:.1f} | {found.flops / 1e12:.0f} | "
        f"{found.seconds:.0f} |"
    )
    assert found.fits, found.error
    state = 2 * shard_bytes(shapes)
    assert state <= found.argument_bytes < state + 0.2 * GIB
    assert found.alias_bytes >= shard_bytes(shapes)  # the gradients stay where they are
    per_token = found.flops * fsdp * tensor / (rows * 4096)
    parameters = TOTALS[name]
    assert 6 * 0.8 * parameters < per_token < 8 * 1.5 * parameters  # 8: a forward pass again
