"""Run by test_hf.py in a process with eight devices: every layout, loaded and saved again."""

import os
import pathlib

import jax
import numpy as np
import pytest

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import ROLLOUT_RULES, TRAIN_RULES
from mmsr_jax.weights import hf, hf_read

EXPORTED = pathlib.Path(os.environ.get("EXPORTED", ""))
REPLICATED = tuple((name, None) for name, _ in TRAIN_RULES)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (MeshConfig(fsdp=8), REPLICATED),
        (MeshConfig(fsdp=8), TRAIN_RULES),
        (MeshConfig(fsdp=4, tensor=2), TRAIN_RULES),
        (MeshConfig(fsdp=2, tensor=4), TRAIN_RULES),
        (MeshConfig(fsdp=1, tensor=8), ROLLOUT_RULES),
    ],
    ids=["replicated", "fsdp", "both", "both, wider tensor", "tensor"],
)
def test_layouts(mesh, rules, tmp_path, monkeypatch):
    assert jax.device_count() == 8
    mesh = make_mesh(mesh)
    read = []
    shard = hf_read._shard

    def watched(*arguments):
        out = shard(*arguments)
        read.append(out.size)
        return out

    monkeypatch.setattr(hf_read, "_shard", watched)
    loaded = hf.load(EXPORTED, mesh=mesh, rules=rules)
    monkeypatch.undo()
    whole = hf.load(EXPORTED)
    targets = qwen.abstract(whole.config, mesh, rules)[1]
    split = 0
    for leaf, wanted, target in zip(
        jax.tree.leaves(loaded.params),
        jax.tree.leaves(whole.params),
        jax.tree.leaves(targets),
        strict=True,
    ):
        assert leaf.sharding == target.sharding and leaf.dtype == wanted.dtype
        np.testing.assert_array_equal(leaf, wanted)
        split += leaf.addressable_shards[0].data.size < leaf.size
    assert bool(split) == (rules is not REPLICATED)
    # Each number is read once, and no more of it at a time than one device holds.
    leaves = jax.tree.leaves(loaded.params)
    assert sum(read) == sum(leaf.size for leaf in leaves)
    assert max(read) == max(leaf.addressable_shards[0].data.size for leaf in leaves)
    hf.save(loaded.params, loaded.config, tmp_path / "out", dtype="float32", shard_bytes=60_000)
    names = sorted(path.name for path in EXPORTED.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (EXPORTED / name).read_bytes(), name
