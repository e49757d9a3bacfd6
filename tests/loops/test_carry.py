"""A run in which slow groups are carried over the change of weights."""

import dataclasses
import json

import pytest

from mmsr_jax import build
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import run as loop
from mmsr_jax.weights.checkpoint import Checkpoints


@pytest.mark.parametrize("cache", ["recompute", "keep"])
def test_groups_in_flight_survive_updates_and_restarts(small, tmp_path, cache, monkeypatch):
    replace = dataclasses.replace
    carry = replace(small.carry, questions=3, staleness=1, cache=cache)
    loss = replace(small.grpo.loss, sampler_correction=2.0)
    grpo = replace(small.grpo, loss=loss, steps=4)
    tools = replace(small.tools, deadline=5.0)
    # A small flight leaves questions waiting for others' searches.
    engine = replace(small.engine, rows=4, flight=16)
    sft = replace(small.sft, steps=2)
    experiment = replace(
        small,
        carry=carry,
        grpo=grpo,
        tools=tools,
        engine=engine,
        sft=sft,
        stages=("sft", "eval", "grpo"),
    )
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save",
        lambda self, step, state, meta: saved.append(meta) or save(self, step, state, meta),
    )  # fmt: skip
    with RunLog(tmp_path / "run", tensorboard=False) as log:
        loop.run(experiment, tmp_path / "run", log)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "grpo"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["rollout/carried"] <= 3 for line in lines)
    ages = [line["train/staleness_max"] for line in lines]
    assert ages[0] == 0 and max(ages) == 1
    carried = [meta["carried"] for meta in saved if "carried" in meta]
    assert [len(c) for c in carried] == [3, 0]  # none at the end: nobody would learn from them
    # A restart asks what was in flight again, from where it was drawn, and then goes on.
    job = build.Job(experiment, tmp_path / "run")
    try:
        from mmsr_jax.loops.grpo import _Sampler

        stream = job.stream("train", experiment.data.grpo_categories, experiment.data.grpo_shares)
        sampler = _Sampler(job, stream)
        middle = next(meta for meta in saved if meta.get("carried"))
        sampler.restore(middle)
        assert sampler.meta(2) == middle | {"skipped": 0}
    finally:
        job.close()
