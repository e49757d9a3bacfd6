"""A run's folder keeps its settings; only what bears on no result may change."""

import dataclasses
import os
import subprocess
import sys

import pytest

from mmsr_jax import experiment as lib
from mmsr_jax.cli.endings import is_mistake
from mmsr_jax.evaluation.policies import EvaluationConfig
from mmsr_jax.experiment import Experiment, ToolsConfig
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.store import StoreConfig
from mmsr_jax.weights.checkpoint import CheckpointConfig


def test_more_money_may_be_given_to_a_run_and_is_kept(tmp_path):
    first = Experiment("x", tools=ToolsConfig(budget=BudgetConfig(1.0)))
    more = dataclasses.replace(first, tools=ToolsConfig(budget=BudgetConfig(2.0)))
    for given in (first, more, more):
        lib.save(given, tmp_path)
        assert lib.read(tmp_path) == given
    other = dataclasses.replace(more, tools=ToolsConfig(store=StoreConfig("calls.db")))
    with pytest.raises(ValueError, match=r"other settings \(tools\.store\.path\)"):
        lib.save(other, tmp_path)
    assert lib.read(tmp_path) == more


def test_settings_survive_a_full_disk(tmp_path, full_disk):
    first = Experiment("x", tools=ToolsConfig(budget=BudgetConfig(1.0)))
    more = dataclasses.replace(first, tools=ToolsConfig(budget=BudgetConfig(2.0)))
    lib.save(first, tmp_path)
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        lib.save(more, tmp_path)
    assert lib.read(tmp_path) == first
    lib.save(more, tmp_path)
    assert lib.read(tmp_path) == more


def test_a_damaged_file_of_settings_is_named(tmp_path):
    lib.save(Experiment("x"), tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"config\.json is damaged .*delete that folder") as caught:
        lib.save(Experiment("x"), tmp_path)
    assert is_mistake(caught.value)


def test_settings_are_kept_where_the_locale_knows_ascii_only(tmp_path):
    code = (
        "import pathlib, sys; from mmsr_jax import experiment as lib; "
        "e, folder = lib.Experiment('\\u00e9'), pathlib.Path(sys.argv[1]); "
        "lib.save(e, folder); lib.save(e, folder)"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | ascii_only)
    assert lib.read(tmp_path).name == "\u00e9"


def fails(experiment, folder, begun):
    with pytest.raises(KeyError), lib.settled(experiment, folder, lambda: begun):
        assert lib.read(folder) == experiment
        (folder / "tokenizer").mkdir(exist_ok=True)
        raise KeyError


def test_a_mistake_before_work_leaves_no_settings_that_bar_the_way(tmp_path):
    fails(Experiment("x"), tmp_path, begun=False)
    assert not list(tmp_path.iterdir())
    fails(Experiment("x", seed=1), tmp_path, begun=True)
    assert lib.read(tmp_path).seed == 1 and (tmp_path / "tokenizer").is_dir()
    fails(Experiment("x", seed=1), tmp_path, begun=False)  # a run that is continued keeps its own
    assert lib.read(tmp_path).seed == 1 and (tmp_path / "tokenizer").is_dir()


def test_a_folder_that_was_there_before_is_not_taken_away(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    fails(Experiment("x"), tmp_path, begun=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CheckpointConfig(every=0), "checkpoint.every is 0, at least 1"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep is 0, at least 1"),
        (lambda: EvaluationConfig(samples=0), "evaluation.samples must be at least 1, not 0"),
    ],
)
def test_settings_that_would_fail_hours_later_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
