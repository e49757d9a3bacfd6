"""Run by test_relayout.py in a process with eight devices: every way from one layout to another."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mmsr_jax.build import Job
from mmsr_jax.experiment import Experiment, TokenizerConfig
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.lora import LoRAConfig
from mmsr_jax.parallel import compiles
from mmsr_jax.parallel import relayout as relayout_lib
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.relayout import relayout
from mmsr_jax.parallel.rules import ROLLOUT_RULES

DEVICES = 8
CHUNK = 4096  # bytes: the largest arrays of the tiny model have 60 kB


def held() -> int:
    """Bytes of all buffers that live on the devices, each counted once."""
    buffers = {}
    for array in jax.live_arrays():
        with contextlib.suppress(RuntimeError):  # donated
            for shard in array.addressable_shards:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


def bytes_of(tree) -> int:
    """On all devices together."""
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards)


@pytest.fixture
def layouts(tiny):
    """layouts(MeshConfig of training, mesh of rollouts) -> params on the former, shapes."""

    def make(train, rollout):
        shapes = qwen.abstract(tiny.model, make_mesh(train))[1]
        params = jax.tree.map(
            lambda p, s: jax.device_put(np.asarray(p), s.sharding), tiny.params(), shapes
        )
        return params, qwen.abstract(tiny.model, rollout, ROLLOUT_RULES)[1]

    return make


def assert_arrived(found, wanted, shapes):
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, leaf), value, shape in zip(
        leaves, jax.tree.leaves(wanted), jax.tree.leaves(shapes), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), name
        left, right = np.asarray(leaf), np.asarray(value)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8), err_msg=name)
        for shard in leaf.addressable_shards:  # every copy of it
            np.testing.assert_array_equal(shard.data, right[shard.index], err_msg=name)


TRAIN = {
    "fsdp": MeshConfig(fsdp=8),
    "both": MeshConfig(fsdp=4, tensor=2),
    "wider tensor": MeshConfig(fsdp=2, tensor=4),
}
ROLLOUT = {  # all devices in one order or the other, or some of them, as a host has of a pod
    "same": lambda train: make_mesh(train),
    "other axes": lambda train: make_mesh(MeshConfig(fsdp=2, tensor=4)),
    "other order": lambda train: make_mesh(train, jax.devices()[::-1]),
    "four": lambda train: make_mesh(MeshConfig(tensor=2), jax.devices()[4:]),
    "one": lambda train: make_mesh(MeshConfig(), jax.devices()[3:4]),
}


@pytest.mark.parametrize(
    ("train", "rollout"),
    [
        ("fsdp", "same"),
        ("both", "other axes"),
        ("wider tensor", "other order"),
        ("both", "four"),
        ("fsdp", "one"),
    ],
)
def test_every_number_arrives(layouts, tiny, train, rollout):
    assert jax.device_count() == DEVICES
    params, shapes = layouts(TRAIN[train], ROLLOUT[rollout](TRAIN[train]))
    assert_arrived(relayout(params, shapes, chunk_bytes=4 * CHUNK), tiny.params(), shapes)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("rollout", ["same", "four"])
def test_memory_stays_under_one_copy_and_a_chunk(layouts, monkeypatch, rollout):
    params, shapes = layouts(TRAIN["both"], ROLLOUT[rollout](TRAIN["both"]))
    relayout(params, shapes, chunk_bytes=CHUNK)  # what compiling leaves behind is there already
    jax.block_until_ready(params)
    before, peak, settle = held(), [], relayout_lib._settle

    def watched(arrays):
        settle(arrays)
        peak.append(held() - before)

    monkeypatch.setattr(relayout_lib, "_settle", watched)
    found = relayout(params, shapes, chunk_bytes=CHUNK)
    copies = bytes_of(
        [a for a, b in zip(*map(jax.tree.leaves, (found, params)), strict=True) if a is not b]
    )
    assert copies > 300_000 and len(peak) > 50
    assert max(peak) <= copies + DEVICES * CHUNK
    assert held() - before <= copies
    # Not because chunks are no chunks: in one piece it takes the double on its way to a few.
    peak.clear()
    relayout(params, shapes)
    if rollout == "four":
        assert max(peak) > copies + 20 * DEVICES * CHUNK


def test_what_lies_right_is_shared_and_nothing_compiles_twice(layouts):
    params, shapes = layouts(TRAIN["both"], ROLLOUT["same"](TRAIN["both"]))
    found = relayout(params, shapes, chunk_bytes=CHUNK)
    pairs = list(zip(*map(jax.tree.leaves, (found, params, shapes)), strict=True))
    shared = [a is b for a, b, _ in pairs]
    assert shared == [b.sharding.is_equivalent_to(s.sharding, b.ndim) for _, b, s in pairs]
    assert any(shared) and not all(shared)
    again = relayout(found, shapes, chunk_bytes=CHUNK)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, found)), strict=True))
    updated = params  # by a program, which names its layouts in its own way
    for _ in range(3):
        updated = jax.tree.map(lambda p: 2 * p, updated)
        count = compiles.count()
        relayout(updated, shapes, chunk_bytes=CHUNK)
    assert compiles.count() == count


@pytest.mark.parametrize("chunk", [16, 64, 300, 10**9])
@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((16, 24), ("fsdp", "tensor"), (None, None)),
        ((16, 24), ("fsdp", "tensor"), ("tensor", "fsdp")),
        ((24, 16), (None, ("fsdp", "tensor")), ("tensor", None)),
        ((40,), ("fsdp",), ("tensor",)),
        ((5, 16), (None, "fsdp"), (None, "tensor")),
    ],
)
def test_any_chunk_of_any_layout(shape, source, target, chunk):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    dtype = jax.numpy.dtype("bfloat16")
    value = np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)
    array = jax.device_put(value, NamedSharding(mesh, PartitionSpec(*source)))
    few = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[2:6])
    for goal in (mesh, few):
        place = NamedSharding(goal, PartitionSpec(*target))
        shapes = {"x": jax.ShapeDtypeStruct(shape, dtype, sharding=place)}
        row = array.nbytes // max(shape)  # more where the long axis is divided
        try:
            found = relayout({"x": array}, shapes, chunk_bytes=chunk)
        except ValueError as error:
            assert f"a chunk of {chunk} bytes cannot hold a slice of x" in str(error)
            assert chunk < 8 * row
            continue
        assert chunk >= row
        assert_arrived(found, {"x": value}, shapes)


def test_from_one_device_to_a_mesh():
    value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    array = jax.device_put(value, SingleDeviceSharding(jax.devices()[0]))
    place = NamedSharding(make_mesh(MeshConfig(fsdp=4, tensor=2)), PartitionSpec("fsdp", None))
    shapes = {"x": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place)}
    for chunk in (32, 64, 256):
        assert_arrived(relayout({"x": array}, shapes, chunk_bytes=chunk), {"x": value}, shapes)


@pytest.mark.parametrize("adapter", [None, LoRAConfig(rank=2, alpha=2.0, targets=("q_proj",))])
def test_a_job_gives_the_engine_all_of_its_weights(tiny, tmp_path, adapter):
    tiny.tokenizer.save(tmp_path)
    job = Job(
        Experiment(
            "e", model=tiny.model, lora=adapter, tokenizer=TokenizerConfig(source=str(tmp_path)),
            mesh=MeshConfig(fsdp=4, tensor=2), engine=tiny.engine_config,
        ),
        tmp_path,
    )  # fmt: skip
    shapes = qwen.abstract(job.model, job.mesh, ROLLOUT_RULES, adapter)[1]
    params = job.start()
    for _ in range(2):  # LoRA's base is laid out once
        params = jax.tree.map(lambda p: 1.5 * p, params)
        job.sync(params)
        assert_arrived(job.engine.params, job.whole(params), shapes)
    kernel = job.engine.params["text"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    missing = {name: tree for name, tree in params.items() if name != "text"}
    with pytest.raises(ValueError, match="text/layers/.* is not fed"):
        job.sync(missing)
