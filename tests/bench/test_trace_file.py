"""Recorded traces: a run's conversations come back with their sizes, places and seconds."""

import asyncio
import json
import zlib

import numpy as np
import pytest

from mmsr_jax import protocol
from mmsr_jax.agent.rollout import Ask, rollout
from mmsr_jax.bench import barrier, engine_replay, trace_file, traces
from mmsr_jax.bench.engine_replay import Latency
from mmsr_jax.cli.main import main
from mmsr_jax.logs import RunLog
from mmsr_jax.report.trace import trace_records
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Author, ResultItem

ACTIONS = (protocol.ImageSearch(), protocol.TextSearch("Paris"), protocol.Answer("Lisbon"))


class Slow:
    def __init__(self, name, picture):
        self.name, self.picture = name, picture

    async def run(self, call):
        await asyncio.sleep(0.03 if self.picture else 0.01)
        return (ResultItem("Lisbon", text="Porto", thumbnail=self.picture),)


@pytest.fixture(scope="module")
def groups(tiny):
    """Real rollouts; what random weights say is understood as some action or other."""
    tools = {
        "image_search": Slow("image_search", tiny.png(28, 28, seed=5)),
        "text_search": Slow("text_search", None),
    }
    machine = tiny.engine(eos_ids=tuple(range(0, 384, 6)))  # turns of many lengths
    asks = [Ask(tiny.example(f"e{n}", image=tiny.png(seed=n)), 4) for n in range(3)]
    with pytest.MonkeyPatch.context() as patch, Toolbox(tools, deadline=5.0) as toolbox:
        patch.setattr(protocol, "parse", lambda text: ACTIONS[zlib.crc32(text.encode()) % 3])
        found, _ = rollout(machine, toolbox, asks, tiny.setting, seed=3, temperature=1.0)
    return found


@pytest.fixture(scope="module")
def run(groups, tmp_path_factory):
    """A run's folder with two steps and an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    log = RunLog(folder, tensorboard=False)
    for step, some in ((2, groups[:2]), (10, groups[2:]), ("eval-after-greedy", groups[:1])):
        log.traces(step, trace_records(some, step))
    return folder


@pytest.fixture
def recorded(run, tiny, tmp_path):
    trace_file.collect(str(run), str(tmp_path / "out.jsonl"))
    return traces.load(tmp_path / "out.jsonl", tiny.model)


def results(trajectory):
    """Seconds of results that the model has read."""
    read = [t.result.seconds for t in trajectory.turns if t.result is not None and t.text]
    return tuple(read)


def test_a_trace_is_its_trajectory_without_words(groups, recorded):
    flat = [t for group in groups for t in group]
    assert len({len(trace.turns) for trace in recorded}) > 1
    assert len({n for trace in recorded for n in trace.turns}) > 3
    assert any(piece.pictures for trace in recorded for piece in trace.tools)
    for trajectory, trace in zip(flat, recorded, strict=True):
        tokens = trajectory.tokens
        for field in ("authors", "positions", "image_index"):
            joined = np.concatenate([getattr(p, field) for p in trace.pieces], axis=-1)
            np.testing.assert_array_equal(joined, getattr(tokens, field), err_msg=field)
        # The markers before and behind a picture stand where they stood; words are others.
        shown = trace.pictures(len(trace.pieces))
        assert [p.grid for p in shown] == [p.grid for p in tokens.pictures]
        assert sum(trace.turns) == int((tokens.authors == Author.MODEL).sum())
        assert trace.seconds == results(trajectory) and len(trace.seconds) == len(trace.tools)
        assert all(0.01 <= seconds < 5 for seconds in trace.seconds)
    names = [[p.digest for t in flat for p in t.tokens.pictures],
             [p.digest for t in recorded for p in t.pictures(len(t.pieces))]]  # fmt: skip
    assert [names[0].index(n) for n in names[0]] == [names[1].index(n) for n in names[1]]
    assert len(set(names[0])) == 4  # a picture a question, and the thumbnail
    assert [len(group) for group in traces.by_group(recorded)] == [4] * 3


def test_no_word_or_name_is_in_a_line(run, groups):
    text = "".join(path.read_text() for path in (run / "traces").iterdir())
    lines = [json.loads(line) for line in text.splitlines()]
    assert {x["group"] for x in lines} == {"2/0", "2/1", "10/0", "eval-after-greedy/0"}
    assert {key for x in lines for key in x} == {"version", "group", "sample", "pieces"}
    assert "Lisbon" not in text
    assert '"ids"' not in text and "capital" not in text


def test_a_replay_does_the_recorded_work(groups, recorded, tiny):
    settings = engine_replay.sizes(recorded, 4, 12)
    machine = engine_replay.warm(tiny.model, tiny.params(), settings)
    flat = [t for group in groups for t in group]
    said = sum(int((t.tokens.authors == Author.MODEL).sum()) for t in flat)
    given = sum(int((t.tokens.authors == Author.TOOL).sum()) for t in flat)
    late = Latency(recorded=True, scale=0.1)
    for figures in (
        engine_replay.replay(machine, recorded, late),
        barrier.replay(machine, recorded, late, batch=8),
    ):
        assert figures["tokens"] == said and figures["timeouts"] == 0
        assert figures["distinct_pictures"] == figures["encoded_pictures"] == 4
    prompts = sum(int((g[0].tokens.authors == Author.PROMPT).sum()) for g in groups)
    assert figures["distinct_tokens"] == prompts + given


def test_recorded_seconds_are_slept_as_they_are(recorded):
    trace = next(t for t in recorded if t.seconds)
    assert Latency(recorded=True).seconds(trace, 0) == trace.seconds[0]
    assert Latency(recorded=True, scale=0.5).seconds(trace, 0) == trace.seconds[0] / 2
    calls = sum(len(t.seconds) for t in recorded)
    described = Latency(recorded=True).described(recorded)
    assert described["calls"] == calls and described["largest"] >= described["p99"] > 0.01


def test_what_was_read_is_written_again(recorded, tiny, tmp_path):
    traces.save(recorded, tmp_path / "again.jsonl")
    for left, right in zip(
        recorded, traces.load(tmp_path / "again.jsonl", tiny.model), strict=True
    ):
        assert (left.group, left.sample, left.seconds) == (right.group, right.sample, right.seconds)
        for a, b in zip(left.pieces, right.pieces, strict=True):
            for field in ("ids", "authors", "positions", "image_index"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_the_command_records_and_another_replays(run, groups, tmp_path, capsys):
    out = str(tmp_path / "run.jsonl")
    assert main(["bench", "traces", str(run), out, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == ["2", "10"] and (record["traces"], record["prompts"]) == (12, 3)
    assert main(["bench", "traces", str(run), out, "--step", "eval-after-greedy"]) == 0
    assert "4 conversations of 1 prompts" in capsys.readouterr().out
    words = ["--parts", "replay", "--peer", "none", "--traces", out, "--latency", "recorded"]
    words += ["--replay-rows", "4", "--flight", "4", "--repeats", "1", "--time-scale", "0.5"]
    assert main(["bench", "engine", *words, "--json"]) == 0
    replay = json.loads(capsys.readouterr().out)["replay"]
    said = sum(int((t.tokens.authors == Author.MODEL).sum()) for t in groups[0])
    assert replay["slow"]["tokens"] == replay["instant"]["tokens"] == said
    assert replay["latency"]["recorded"] and replay["latency"]["scale"] == 0.5
    assert replay["latency"]["calls"] == sum(len(results(t)) for t in groups[0])


PROMPT = {"author": "prompt", "tokens": 9}
WORDS = {"author": "model", "tokens": 3}
TOOL = {"author": "tool", "tokens": 5, "seconds": 1.0}
PICTURE = {"name": "a", "grid": [1, 2, 4], "at": 2, "tokens": 2}


def said(*pieces, **fields):
    return json.dumps({"version": 1, "group": "a", "sample": 0, "pieces": pieces} | fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"version": 1, "gro', "line 2 is no trace"),
        ('{"example": "q", "turns": []}', "line 2 is no trace: no 'pieces'"),
        ("[1]", "no object"),
        ("[" * 100_000, "line 2 is no trace"),
        (said(PROMPT, WORDS, version=2), "version 2, and this mmsr reads 1"),
        (said(PROMPT, WORDS | {"tokens": 0}), "tokens is 0, not a whole number from 1 on"),
        (said(PROMPT, WORDS | {"ids": [3]}), "either tokens or ids"),
        (said(PROMPT, WORDS, TOOL | {"seconds": -1}, WORDS), "a piece by tool of -1.0 seconds"),
        (said(PROMPT, WORDS, TOOL | {"seconds": float("nan")}, WORDS), "of nan seconds"),
        (said(PROMPT | {"tokens": 3, "pictures": [PICTURE]}, WORDS), "a picture at 2 of 2 tokens"),
        (said(PROMPT | {"pictures": [PICTURE, PICTURE]}, WORDS), "where 4 to 9 of its piece"),
        (said(PROMPT | {"tokens": 10}, WORDS), "group a has two prompts"),
    ],
)
def test_damaged_runs_write_nothing(tmp_path, line, message):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "1.jsonl").write_text(said(PROMPT, WORDS) + "\n" + line + "\n")
    with pytest.raises(ValueError) as caught:
        trace_file.collect(str(tmp_path), str(tmp_path / "out.jsonl"))
    assert message in str(caught.value) and "1.jsonl, line 2" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]


def test_pictures_that_the_model_would_merge_otherwise(tiny, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text(said(PROMPT | {"pictures": [PICTURE | {"tokens": 4}]}, WORDS))
    with pytest.raises(ValueError, match="of 4 tokens, but this model makes 2 of its grid"):
        traces.load(file, tiny.model)


def test_foreign_files_and_wrong_wishes(run, tmp_path, capsys):
    def fails(*words):
        assert main(["bench", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    out = str(tmp_path / "out.jsonl")
    assert "holds no traces" in fails("traces", str(tmp_path), out)
    wrong = fails("traces", str(run), out, "--step", "3")
    assert "has no step 3; there are 2, 10, eval-after-greedy" in wrong
    quick = ("engine", "--parts", "replay", "--peer", "none", "--latency")
    assert "give --traces FILE" in fails(*quick, "recorded")
    assert "latency 'slow' is none of drawn, recorded" in fails(*quick, "slow")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    wrong = fails(*quick, "recorded", "--traces", str(tmp_path / "binary"))
    assert "binary is no file of traces: no text at byte 0" in wrong
    named = ("--traces", str(tmp_path / "silent"))
    (tmp_path / "silent").write_text(said(PROMPT, WORDS, {"author": "tool", "tokens": 2}, WORDS))
    assert "--p99: only of --latency drawn" in fails(*quick, "recorded", "--p99", "3", *named)
    wrong = fails(*quick, "recorded", *named)
    assert "group a, sample 0 does not say how long its 1 tool calls took" in wrong
