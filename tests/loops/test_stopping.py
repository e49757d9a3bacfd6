"""The end of the money ends a run at once, and all of its processes at the same place."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from mmsr_jax.logs import RunLog
from mmsr_jax.loops import evaluate, grpo, stopping
from mmsr_jax.loops import run as loop
from mmsr_jax.tools.budget import BudgetSpent, SearchStopped


def job(check):
    search = types.SimpleNamespace(check=check)
    evaluation = types.SimpleNamespace(categories=("a",), unseen=("b",))
    experiment = types.SimpleNamespace(evaluation=evaluation, seed=0)
    return types.SimpleNamespace(
        search=search, experiment=experiment, examples=lambda *_: [], engine=None, toolbox=None,
        setting=None, skipped=0,
    )  # fmt: skip


def spent():
    raise BudgetSpent("the money is spent")


class Log:
    @contextlib.contextmanager
    def progress(self, *_):
        yield types.SimpleNamespace(advance=lambda steps: None)


def test_evaluation_stops_with_the_question_at_which_the_money_ends(monkeypatch):
    ended = []

    def rollout(*_, done, **__):
        for number in range(10):
            ended.append(number)
            done(1)
        return [], {}

    def check():
        if len(ended) == 3:
            spent()

    monkeypatch.setattr(evaluate, "rollout", rollout)
    with pytest.raises(BudgetSpent, match="the money is spent"):
        evaluate._play(job(check), Log(), "x", 0.0, 1)
    assert ended == [0, 1, 2]


@pytest.mark.parametrize("mine", [False, True])
def test_processes_stop_together(monkeypatch, mine):
    asked = []

    def gather(value):
        asked.append(value)
        return np.array([False, True, value])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    told = "the money is spent" if mine else "process 1 of this run cannot search any more"
    with pytest.raises(SearchStopped, match=told):
        stopping.check_search(job(spent if mine else lambda: None))
    assert asked == [mine]
    stopping.check_search_between(job(spent))  # where they do not meet nobody may stop alone


def test_processes_go_on_together(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda value: np.array([value, value])
    )
    stopping.check_search(job(lambda: None))


def test_training_asks_all_processes(small, tmp_path, monkeypatch):
    """One step of GRPO in which another process has to stop."""

    def elsewhere(job):
        raise SearchStopped("process 1 of this run")

    monkeypatch.setattr(grpo, "check_search", elsewhere)
    given = dataclasses.replace(
        small,
        stages=("grpo",),
        grpo=dataclasses.replace(small.grpo, steps=1, prompts=1, group_size=2),
    )
    with RunLog(tmp_path) as log, pytest.raises(SearchStopped, match="process 1"):
        loop.run(given, tmp_path, log)
