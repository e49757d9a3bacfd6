"""A whole run that trains an adapter alone: what it keeps, how it goes on, what the engine gets."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.build import Job
from mmsr_jax.cli import config as config_lib
from mmsr_jax.experiment import Experiment
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import run as loop
from mmsr_jax.model import lora
from mmsr_jax.train import state as state_lib

LORA = lora.LoRAConfig(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def adapted(small) -> Experiment:
    replace = dataclasses.replace
    return replace(
        small,
        lora=LORA,
        stages=("sft", "grpo"),
        sft=replace(small.sft, steps=2),
        grpo=replace(small.grpo, steps=3, loss=replace(small.grpo.loss, kl_weight=0.1)),
        checkpoint=replace(small.checkpoint, every=1),
    )


@pytest.fixture(scope="module")
def whole(adapted, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    with RunLog(workdir) as log:
        loop.run(adapted, workdir, log)
    return workdir


def metrics(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "compile/", "engine/")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]


def test_the_record_and_its_flags(adapted, small):
    assert Experiment.from_json(adapted.to_json()) == adapted
    assert Experiment.from_json(small.to_json()).lora is None
    assert config_lib.override(small, ["--lora.rank", "8"], "p").lora == lora.LoRAConfig(rank=8)
    changed = config_lib.override(
        adapted, ["--lora.rank", "8", "--lora.targets", "up_proj"], "p"
    ).lora
    assert changed == dataclasses.replace(LORA, rank=8, targets=("up_proj",))


def test_checkpoints_hold_the_adapter_alone(whole, adapted):
    job = Job(adapted, whole)
    shapes = lora.split(job._training[1])[1]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for stage, step in (("sft", 2), ("grpo", 3)):
        folder = whole / "checkpoints" / stage / str(step) / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            held = checkpointer.restore(folder)  # whatever is there
        sizes = [leaf.size for leaf in jax.tree.leaves(held)]
        assert sum(n for n in sizes if n > 1) == 3 * count, stage  # itself and two moments
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["model/trained_parameters"] == count < summary["model/parameters"] / 5


def test_sampler_and_trainer_agree_and_nothing_compiles_when_warm(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["stage"] == "grpo"]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert max(line["train/logprob_gap_max"] for line in logged) < 1e-4
    assert logged[1]["compile/count"] == logged[2]["compile/count"]
    # The reference is where GRPO started: the base with the warm-up's adapter.
    assert logged[0]["train/kl"] == pytest.approx(0, abs=1e-9) and logged[2]["train/kl"] > 0


def test_a_stopped_run_goes_on_from_the_same_base(whole, adapted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "grpo" / "3")
    (workdir / "summary.json").unlink()
    with RunLog(workdir) as log:
        loop.run(adapted, workdir, log)
    assert metrics(workdir) == metrics(whole)
    left, right = (Job(adapted, folder).newest_params() for folder in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_engine_gets_the_base_once(whole, adapted):
    job = Job(adapted, whole)
    newest = job.newest_params()
    job.sync(newest)
    first, adapter = lora.split(job.engine.params)
    jax.tree.map(np.testing.assert_array_equal, adapter, job.engine.lay_out(newest))
    jax.tree.map(np.testing.assert_array_equal, first, job.engine.lay_out(job.base))
    job.sync(jax.tree.map(lambda p: p + 1, newest))
    again, moved = lora.split(job.engine.params)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    assert all(a is b for a, b in leaves)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a + 1, b), adapter, moved)
    jax.tree.map(np.testing.assert_array_equal, job.base, job.fresh_params())
    merged = job.merged(newest)
    assert jax.tree.structure(merged) == jax.tree.structure(job.base)


def test_the_reference_costs_no_second_copy(adapted, tmp_path):
    """From a fresh adapter it is the base itself; after a warm-up the base under a copied one."""
    job = Job(dataclasses.replace(adapted, stages=("grpo",)), tmp_path)
    assert job.reference(job.start()) is job.base
    shapes = jax.tree.structure(job.base)
    assert job.fixed(None).reference_graph is not None and job.fixed(None).base is job.base
    job = Job(adapted, tmp_path)
    start = job.start()
    base, kept = lora.split(job.reference(start))
    assert job.fixed(None).reference_graph is None
    assert jax.tree.structure(base) == shapes
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (base, job.base)), strict=True))
    assert not any(a is b for a, b in zip(*map(jax.tree.leaves, (kept, start)), strict=True))
    assert jax.tree.structure(state_lib.whole(start, job.base)) == jax.tree.structure(
        lora.join(base, kept)
    )


def test_a_folder_of_fully_trained_weights_is_refused(small, tmp_path):
    experiment_lib.save(small, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(lora\)"):
        experiment_lib.save(dataclasses.replace(small, lora=LORA), tmp_path)
