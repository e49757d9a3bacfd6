"""Timing side by side, and counting of operations and bytes."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from mmsr_jax.bench import measure, workload
from mmsr_jax.model import qwen2_5_vl as qwen


def test_two_functions_take_turns():
    order = []
    slow = {"a": lambda: order.append("a"), "b": lambda: (time.sleep(0.02), order.append("b"))}
    times = measure.interleave(slow, runs=3)
    assert order == ["a", "b"] * 4  # the first of each is not counted
    assert len(times["a"].seconds) == len(times["b"].seconds) == 3
    assert times["b"].best >= 0.02 > times["a"].best


def test_best_and_median_of_runs():
    times = measure.Times((4.0, 1.0, 2.0))
    assert (times.best, times.median) == (1.0, 2.0)
    assert times.record(per=2) == {"min_ms": 500.0, "median_ms": 1000.0, "runs": 3}
    with pytest.raises(ValueError, match="at least one run"):
        measure.interleave({}, runs=0)


def test_limits_are_rates_of_what_was_run(monkeypatch):
    seen = {}

    def fake(functions, runs):
        for function in functions.values():
            function()
        seen["runs"] = runs
        return {name: measure.Times((0.5,)) for name in functions}

    monkeypatch.setattr(measure, "interleave", fake)
    found = measure.limits("float32", matrix=64, megabytes=2)
    assert found.flops == 2 * 64**3 / 0.5
    assert found.bandwidth == 2 * (500_000 // 4096 * 4096 * 4) / 0.5


@pytest.mark.parametrize("name", ["small", "med"])
def test_rows_are_those_of_the_peer_figures(name):
    """Grids, lengths and deltas that transformers gave for these pictures."""
    work = workload.workload(name, workload.M100)
    grids, patches, tokens, delta = {
        "small": (((1, 4, 8), (1, 10, 6)), 92, 60, -14),
        "med": (((1, 32, 24), (1, 16, 22)), 1120, 317, -253),
    }[name]
    assert (work.grids, len(work.patches), work.ids.shape, work.delta) == (
        grids, patches, (1, tokens), delta,
    )  # fmt: skip
    vision = work.inputs.vision
    assert vision.patches.shape[0] == patches and vision.frames.shape[0] == 2
    assert (vision.windows.min(axis=1) < patches).all(), "a window of nothing but padding"
    special = {10, 11, 12, 13, 0, 2}
    others = work.ids[0][work.inputs.image_index[0] < 0]
    assert sorted(set(others.tolist()) & special) == [12, 13]


def test_no_such_row():
    with pytest.raises(ValueError, match="no row 'huge'; there are small, med, large"):
        workload.workload("huge", workload.M100)


def test_parameters_of_the_hundred_million_model():
    assert workload.parameters(qwen.abstract(workload.M100)[1]) == 97_479_296


def test_forward_operations_are_those_that_xla_counts():
    """One layer a tower, so that its count of loops (once) is right; it adds what is no product."""
    base = workload.M100
    config = dataclasses.replace(
        base,
        text=dataclasses.replace(base.text, layers=1, vocab_size=512),
        vision=dataclasses.replace(base.vision, depth=1, full_attention_layers=(0,)),
    )
    work = workload.workload("small", config)
    graph, shapes = qwen.abstract(config)
    inputs = jax.eval_shape(lambda: work.inputs)
    lowered = jax.jit(qwen.forward, static_argnums=0).lower(graph, shapes, inputs)
    counted = lowered.cost_analysis()["flops"]
    assert 0.97 < workload.forward_flops(config, work) / counted < 1.0


def test_bytes_of_a_decoding_step():
    """Every number of the language model, a tied table once, and the cache of each row."""
    config = workload.M100
    text = workload.parameters(qwen.abstract(config)[1]["text"])
    cache = 12 * 2 * 2 * 64 * 100
    assert workload.decode_bytes(config, 1, 100) == 4 * (text + cache)
    assert workload.decode_bytes(config, 4, 100) == 4 * (text + 4 * cache)
    untied = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=False))
    assert workload.decode_bytes(untied, 4, 0) - workload.decode_bytes(config, 4, 0) == 4 * 4 * 640
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    assert workload.decode_bytes(half, 4, 100) * 2 == workload.decode_bytes(config, 4, 100)
    assert np.isclose(text * 4, 318e6, rtol=0.01)
