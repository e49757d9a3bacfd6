"""A run's folder keeps its settings; only what bears on no result may change."""

import dataclasses

import pytest

from mmsr_jax import experiment as lib
from mmsr_jax.experiment import Experiment, ToolsConfig
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.store import StoreConfig


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
