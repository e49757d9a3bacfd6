"""A whole run, shrunk: same seed same metrics, killed and continued, nothing compiles when warm."""

import collections
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import run as loop

# What may differ between two equal runs: clocks, and programs that another test has compiled.
UNEQUAL = ("time/", "compile/", "engine/")


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def metrics(workdir: pathlib.Path) -> list[dict]:
    """What equal runs have in common."""
    return [{k: v for k, v in line.items() if not k.startswith(UNEQUAL)} for line in lines(workdir)]


def summary(workdir: pathlib.Path) -> dict:
    values = json.loads((workdir / "summary.json").read_text())
    return {k: v for k, v in values.items() if not k.startswith(UNEQUAL)}


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> pathlib.Path:
    """A run that nobody disturbed, with the files of contract.md in its folder."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with RunLog(workdir) as log:
        loop.run(small, workdir, log)
    return workdir


def test_run_leaves_what_the_contract_names(whole, small):
    for name in ("config.json", "metrics.jsonl", "summary.json", "eval.json", "report.html"):
        assert (whole / name).is_file(), name
    assert (whole / "trajectories" / "1.jsonl").is_file()
    for step in ("1", "5", "eval-before-greedy", "eval-after-sampled", "eval-always_search"):
        traced = (whole / "traces" / f"{step}.jsonl").read_text().splitlines()
        groups = collections.Counter(json.loads(line)["group"] for line in traced)
        if step in ("1", "5"):  # all of them, not only those that are shown
            assert list(groups.values()) == [small.grpo.group_size] * small.grpo.prompts
        assert groups
    assert list((whole / "tensorboard").rglob("events*"))
    assert experiment_lib.Experiment.from_json((whole / "config.json").read_text()) == small
    logged = [line for line in lines(whole) if line["stage"] == "grpo"]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]
    for name in (
        "reward/mean", "reward/accuracy", "reward/format", "search/ratio", "search/image_ratio",
        "search/text_ratio", "train/loss", "train/kl", "train/grad_norm",
        "train/logprob_gap_mean", "train/logprob_gap_max", "engine/occupancy",
        "engine/tokens_per_second", "time/rollout", "time/tools_wait", "time/update", "time/sync",
    ):  # fmt: skip
        assert name in logged[0], name
    values = summary(whole)
    for name in (
        "eval/before/accuracy", "eval/before/known/search_ratio",
        "eval/before/unknown/search_ratio", "eval/after/accuracy", "eval/after/reward",
        "eval/after/format", "eval/after/never_shown/search_ratio",
        "eval/always_search/reward", "eval/never_search/reward",
    ):  # fmt: skip
        assert name in values, name


def test_sampler_and_trainer_agree_all_along(whole):
    gaps = [m["train/logprob_gap_max"] for m in metrics(whole) if m["stage"] == "grpo"]
    assert gaps and max(gaps) < 1e-4


def test_nothing_compiles_after_the_second_grpo_step(whole):
    counts = [line["compile/count"] for line in lines(whole) if line["stage"] == "grpo"]
    assert len(set(counts[1:])) == 1, counts


def test_same_seed_same_metrics(whole, small, tmp_path):
    with RunLog(tmp_path / "run") as log:
        loop.run(small, tmp_path / "run", log)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert summary(tmp_path / "run") == summary(whole)


PROGRAM = """
import pathlib, sys
from mmsr_jax.experiment import Experiment
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import run
workdir = pathlib.Path(sys.argv[1])
with RunLog(workdir) as log:
    run.run(Experiment.from_json(pathlib.Path(sys.argv[2]).read_text()), workdir, log)
"""


def test_killed_in_grpo_and_continued_is_the_same_run(whole, small, tmp_path):
    """SIGKILL once GRPO has logged its third step: the checkpoint of step 2 is what remains."""
    workdir, given = tmp_path / "run", tmp_path / "experiment.json"
    given.write_text(small.to_json())
    command = [sys.executable, "-c", PROGRAM, str(workdir), str(given)]
    child = subprocess.Popen(command)
    until = time.monotonic() + 240
    while not (workdir / "trajectories" / "3.jsonl").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until, "the run did not reach its third step"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (workdir / "summary.json").exists()
    subprocess.run(command, check=True, timeout=240)
    assert metrics(workdir) == metrics(whole)
    assert summary(workdir) == summary(whole)


def test_a_run_that_is_done_keeps_its_figures(whole, small):
    before = (whole / "summary.json").read_bytes()  # its times and compilations among them
    with RunLog(whole) as log:
        loop.run(small, whole, log)
        assert not log.begun
    assert (whole / "summary.json").read_bytes() == before


@pytest.mark.parametrize("room", ["data", "evaluation"])
def test_a_category_that_there_is_not_ends_a_run_before_it_begins(small, tmp_path, room):
    name = "grpo_categories" if room == "data" else "categories"
    changed = dataclasses.replace(getattr(small, room), **{name: ("known", "unknwn")})
    if room == "data":
        changed = dataclasses.replace(changed, grpo_shares=())
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match=r"no category \['unknwn'\]"):
        loop.run(dataclasses.replace(small, **{room: changed}), tmp_path, log)
    assert not log.begun and not list(tmp_path.iterdir())


def test_other_settings_in_the_same_folder_are_refused(whole, small):
    other = dataclasses.replace(small, grpo=dataclasses.replace(small.grpo, prompts=2))
    with RunLog(whole) as log, pytest.raises(ValueError, match=r"grpo\.prompts"):
        loop.run(other, whole, log)
