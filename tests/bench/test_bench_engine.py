"""`mmsr bench engine` at the smallest size: what its figures are made of. No times are asserted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mmsr_jax.bench import barrier, engine, engine_decode, engine_replay, traces
from mmsr_jax.bench.engine_replay import Latency
from mmsr_jax.cli.main import main
from mmsr_jax.engine.engine import Engine
from mmsr_jax.model import qwen2_5_vl as qwen

NOW = Latency(scale=0.0)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two layers a tower, and little memory to read: compiling takes long."""
    tiny = engine.SIZES["tiny"]
    tiny = dataclasses.replace(
        tiny,
        text=dataclasses.replace(tiny.text, layers=2),
        vision=dataclasses.replace(tiny.vision, depth=2, full_attention_layers=(1,)),
    )
    real = engine_decode.Memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.SIZES, "tiny", tiny)
        patch.setattr(engine_decode, "Memory", lambda dtype: real(dtype, megabytes=1))
        yield tiny


@pytest.fixture(scope="module")
def played(small):
    return traces.draw(3, small)


@pytest.fixture(scope="module")
def machine(small, played):
    """An engine of four rows, twelve in flight."""
    import jax

    params = qwen.init(small, jax.random.key(0))
    return engine_replay.warm(small, params, engine_replay.sizes(played, 4, 12))


def recorded(played):
    return sorted((t.group, t.sample, turn, n) for t in played for turn, n in enumerate(t.turns))


@pytest.fixture
def words(monkeypatch):
    """Turns as the engine gives them: [(number, tokens)]."""
    seen = []
    real = Engine.step

    def step(self, temperature):
        turns = real(self, temperature)
        seen.extend((turn.number, len(turn.ids)) for turn in turns)
        return turns

    monkeypatch.setattr(Engine, "step", step)
    return seen


@pytest.mark.parametrize("latency", [NOW, Latency(scale=2e-4)])
def test_a_replay_does_the_recorded_work_and_nothing_twice(machine, played, words, latency):
    first = machine._next
    run = engine_replay.replay(machine, played, latency)
    by_number = {}
    for number, count in words:
        by_number.setdefault(number - first, []).append(count)
    assert [by_number[n] for n in range(len(played))] == [list(t.turns) for t in played]
    assert run["tokens"] == sum(sum(t.turns) for t in played)
    assert run["tokens_per_s"] == pytest.approx(run["tokens"] / run["seconds"])
    # The last token of a prompt is fed by decoding.
    assert run["prefill_tokens"] == run["distinct_tokens"] - 3
    assert run["dropped"] == run["again_tokens"] == 0
    assert run["encoded_pictures"] == run["distinct_pictures"] > 3
    assert 0 < run["occupancy"] <= 1 and 0 <= run["no_work_share"] < 1
    assert run["steady"]["tokens"] <= run["tokens"]
    assert not machine.live and machine.free_pages == machine.schedule.pool.total


def test_a_small_pool_feeds_some_tokens_again(small, machine, played):
    pages = machine.device.table + 3
    tight = engine_replay.warm(small, machine.params, engine_replay.sizes(played, 4, 12, pages))
    run = engine_replay.replay(tight, played, NOW)
    assert run["dropped"] > 0 and run["again_tokens"] > 0
    assert run["prefill_ratio"] > 1 and run["tokens"] == sum(sum(t.turns) for t in played)


def test_the_barrier_says_the_same_and_feeds_conversations_again(machine, played, words):
    run = barrier.replay(machine, played, NOW, batch=8)
    assert sorted(n for _, n in words) == sorted(n for t in played for n in t.turns)
    again = sum(
        sum(len(piece) for piece in t.pieces[: 2 * turn + 1]) - 1
        for t in played
        for turn in range(1, len(t.turns))
    )
    assert run["prefill_tokens"] == sum(len(t.prompt) - 1 for t in played[::8]) + again
    assert not machine.live and machine.free_pages == machine.schedule.pool.total


def test_latencies_are_heavy_tailed_and_the_same_each_time(small):
    many = traces.draw(60, small)
    drawn = [Latency().seconds(trace, turn) for trace in many for turn in range(6)]
    assert drawn == [Latency().seconds(trace, turn) for trace in many for turn in range(6)]
    assert 0.9 < np.median(drawn) < 1.1 and 14 < np.quantile(drawn, 0.99) < 28
    half = Latency(scale=0.5)
    assert half.seconds(many[0], 1) == pytest.approx(Latency().seconds(many[0], 1) / 2)
    assert math.log(20) / engine_replay.P99 == pytest.approx(1.2878, abs=1e-4)


def test_a_late_tool_ends_at_its_deadline_and_the_replay_goes_on(machine, played):
    late = Latency(median=0.2, p99=0.2, deadline=0.01)
    run = engine_replay.replay(machine, played[:8], late)
    assert run["timeouts"] == sum(len(t.tools) for t in played[:8]) > 0


QUICK = ["--sizes", "tiny", "--rows", "2", "--contexts", "9", "--tokens", "5", "--runs", "1",
         "--replay-rows", "4", "--flight", "12", "--groups", "2", "--loop-groups", "1",
         "--repeats", "1", "--time-scale", "0.0002"]  # fmt: skip


def test_every_part_has_its_figures_and_its_peer(capsys):
    assert main(["bench", "engine", *QUICK, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (case,) = record["decode"]
    assert (case["size"], case["rows"], case["context"]) == ("tiny", 2, 9)
    assert case["equal_tokens"] == 1.0 and case["peer_way"]["cache"] in ("dynamic", "static")
    assert case["ratio"] == pytest.approx(
        case["ours"]["tokens_per_s"] / case["peer"]["tokens_per_s"]
    )
    assert case["of_floor"] == pytest.approx(
        case["ours"]["tokens_per_s"] / case["floor_tokens_per_s"]
    )
    replay = record["replay"]
    assert (replay["prompts"], replay["traces"]) == (2, 16)
    for name in ("instant", "slow", "barrier", "barrier_large"):
        assert replay[name]["tokens"] == replay["tokens"]
    assert replay["slow_by_instant"] == pytest.approx(
        replay["slow"]["tokens_per_s"] / replay["instant"]["tokens_per_s"]
    )
    assert replay["faster_than_barrier"] == pytest.approx(
        replay["barrier"]["seconds"] / replay["slow"]["seconds"]
    )
    loop = replay["loop"]
    assert loop["ours"]["tokens"] == loop["peer"]["tokens"]
    assert {loop[name]["tokens"] for name in ("ours_slow", "peer_slow", "peer_single")} == {
        loop["ours"]["tokens"]
    }
    assert loop["ratio"] == pytest.approx(loop["peer"]["seconds"] / loop["ours"]["seconds"])
    slow = loop["peer_slow"]["seconds"] / loop["ours_slow"]["seconds"]
    assert loop["ratio_slow"] == pytest.approx(slow)


def test_a_table_of_a_file_without_peer(capsys, tmp_path, small):
    file = tmp_path / "traces.jsonl"
    traces.save(traces.draw(1, small), file)
    words = ["--peer", "none", "--parts", "replay", "loop", "--traces", str(file)]
    assert main(["bench", "engine", *QUICK, *words]) == 0
    shown = capsys.readouterr().out
    assert "8 conversations of 1 prompts" in shown and "ours, slow tools" in shown
    assert "peer: none" in shown and "plain loop" not in shown and "barrier" not in shown


def test_other_tokens_are_not_timed(monkeypatch, capsys):
    real = engine_decode.Ours.run
    monkeypatch.setattr(
        engine_decode.Ours,
        "run",
        lambda self, prompts: (real(self, prompts)[0], real(self, prompts)[1] + 1),
    )
    assert main(["bench", "engine", *QUICK, "--parts", "decode"]) == 1
    assert "choose the same 0.0% of tokens at 2 rows of 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "sleep"], "no part 'sleep'; there are decode, replay, barrier, loop"),
        (["--sizes", "big"], "no size 'big'; there are m100, tiny"),
        (["--peer", "vllm"], "peer 'vllm' is none of torch, none"),
        (["--flight", "0"], "must be at least 1"),
        (["--time-scale", "-1"], "times -1.0"),
        (["--median", "30"], "median 30.0 s, p99 20.0 s"),
        (["--traces", "/no/such/file"], "/no/such/file"),
    ],
)
def test_mistakes_end_in_one_line(words, said, capsys):
    assert main(["bench", "engine", "--sizes", "tiny", "--peer", "none", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
