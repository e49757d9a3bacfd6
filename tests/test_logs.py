import json
import logging

import numpy as np
import pytest
from rich.console import Console

from mmsr_jax import logs
from mmsr_jax.logs import PlainBar, RunLog, duration, read_metrics


def write(log, *steps):
    for stage, step in steps:
        log.scalars(step, stage, {"reward/mean": step / 10})


def places(log):
    return [(record["stage"], record["step"]) for record in read_metrics(log.metrics_file)]


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "run", tensorboard=False)


def test_a_line_holds_step_stage_and_plain_values(log):
    values = {"a/f": np.float32(0.5), "a/i": np.int64(3), "a/nan": float("nan"), "a/s": "x"}
    log.scalars(np.int32(7), "grpo", values)
    (line,) = log.metrics_file.read_text().splitlines()
    assert json.loads(line) == {
        "step": 7, "stage": "grpo", "a/f": 0.5, "a/i": 3, "a/nan": None, "a/s": "x",
    }  # fmt: skip


def test_nothing_is_created_before_something_is_logged(log):
    log.resume()
    assert not log.workdir.exists() and not log.begun
    write(log, ("sft", 1))
    assert log.begun


def test_resume_drops_what_lies_beyond_the_checkpoint(log):
    write(log, ("sft", 1), ("sft", 2), ("eval", 0), ("grpo", 1), ("grpo", 2), ("grpo", 3))
    log.resume("grpo", 2)
    assert places(log)[-1] == ("grpo", 2)
    write(log, ("grpo", 3))
    assert places(log)[-2:] == [("grpo", 2), ("grpo", 3)]
    log.resume("sft", 2)  # back at the end of a stage: all later stages go
    assert places(log) == [("sft", 1), ("sft", 2)]
    log.resume("sft", 1)
    assert places(log) == [("sft", 1)]


def test_resume_at_a_stage_without_lines_keeps_the_stages_before(log):
    write(log, ("sft", 1), ("sft", 2))
    log.resume("grpo", 0)
    assert places(log) == [("sft", 1), ("sft", 2)]


def test_resume_with_sparse_logging_keeps_the_last_line_before_the_checkpoint(log):
    write(log, ("grpo", 10), ("grpo", 20), ("grpo", 30))
    log.resume("grpo", 25)
    assert places(log) == [("grpo", 10), ("grpo", 20)]


def test_resume_without_a_place_starts_over(log):
    write(log, ("sft", 1), ("grpo", 1))
    log.resume()
    assert places(log) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "sta', '{"step": 3}', "7", "\xff"])
def test_a_torn_last_line_is_forgotten(log, torn):
    write(log, ("grpo", 1), ("grpo", 2))
    with log.metrics_file.open("a", encoding="latin-1") as file:
        file.write(torn)
    assert places(log) == [("grpo", 1), ("grpo", 2)]
    write(RunLog(log.workdir, tensorboard=False), ("grpo", 3))  # without resume, too
    assert places(log) == [("grpo", 1), ("grpo", 2), ("grpo", 3)]


def test_a_last_line_without_its_newline_is_kept(log):
    write(log, ("grpo", 1))
    log.metrics_file.write_bytes(log.metrics_file.read_bytes().rstrip(b"\n"))
    log.resume("grpo", 1)
    write(log, ("grpo", 2))
    assert places(log) == [("grpo", 1), ("grpo", 2)]


@pytest.mark.parametrize("line", ["oops", '{"step": 1e999, "stage": "grpo"}', "[]"])
def test_a_broken_line_in_the_middle_is_named(log, line):
    write(log, ("grpo", 1))
    with log.metrics_file.open("a") as file:
        file.write(line + "\n")
    write(log, ("grpo", 2))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no metrics record"):
        places(log)


def test_trajectories_replace_an_older_file(log):
    log.trajectories(12, [{"example": "a"}, {"example": "ü"}])
    log.trajectories(12, [{"example": "b"}])
    path = log.workdir / "trajectories" / "12.jsonl"
    assert path.read_text() == '{"example": "b"}\n'
    assert [file.name for file in path.parent.iterdir()] == ["12.jsonl"]  # no drafts left


def test_half_a_surrogate_pair_does_not_end_a_run(log):
    log.trajectories(1, [{"text": "a\ud800b"}])
    assert (log.workdir / "trajectories" / "1.jsonl").read_text() == '{"text": "a?b"}\n'


def test_only_the_primary_process_writes(tmp_path):
    log = RunLog(tmp_path / "run", primary=False)
    log.scalars(1, "grpo", {"a": 1.0})
    log.trajectories(1, [{}])
    log.resume()
    with log.progress(3, "grpo") as bar:
        bar.advance()
    assert not log.workdir.exists() and log.begun


def test_tensorboard_gets_one_run_per_stage_and_forgets_on_resume(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with RunLog(tmp_path) as log:
        write(log, ("sft", 1), ("grpo", 1), ("grpo", 2))
    with RunLog(tmp_path) as log:
        log.resume("grpo", 1)
        write(log, ("grpo", 2))

    def events(path):
        data, place = path.read_bytes(), 0
        while place < len(data):  # length, its checksum, record, its checksum
            length = int.from_bytes(data[place : place + 8], "little")
            yield Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4

    assert (tmp_path / "tensorboard" / "sft").is_dir()
    files = sorted((tmp_path / "tensorboard" / "grpo").iterdir())
    found = [event for file in files for event in events(file)]
    starts = [e.step for e in found if e.HasField("session_log")]
    assert starts == [2]
    assert [e.step for e in found if e.summary.value] == [1, 2, 2]


def test_progress_on_a_terminal_can_be_nested(log, monkeypatch, capsys):
    monkeypatch.setattr(logs, "CONSOLE", Console(stderr=True, force_terminal=True, width=120))
    with log.progress(4, "grpo", start=1) as bar:
        bar.advance({"reward": 0.91234})
        with log.progress(2, "evaluation") as inner:
            inner.advance()
        log.print("a table")
        bar.advance(steps=2)
        assert bar.done == 4
    shown = capsys.readouterr().err
    assert "reward 0.912" in shown and "evaluation" in shown and "a table" in shown
    with log.progress(1, "again") as bar:
        bar.advance()


def test_a_printed_line_stays_one_line_and_is_no_markup(log, capsys):
    log.print("[red]" + "x" * 200)
    assert capsys.readouterr().out == "[red]" + "x" * 200 + "\n"


def test_plain_progress_prints_now_and_then_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(logs, "CONSOLE", Console(stderr=True, force_terminal=False))
    seconds = iter([0, 1, 2, 12, 13, 14])
    bar = PlainBar(5, "grpo", 0, clock=lambda: next(seconds))
    for reward in (0.1, 0.2, 0.3, 0.4, 0.5):
        bar.advance({"reward": reward})
    assert capsys.readouterr().err.splitlines() == [
        "grpo 1/5  reward 0.1  1 s, 4 s left",
        "grpo 3/5  reward 0.3  12 s, 8 s left",
        "grpo 5/5  reward 0.5  14 s",
    ]


def test_log_records_are_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(logs, "CONSOLE", Console(stderr=True, width=40))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        logs.show_log()
        logging.getLogger("mmsr_jax.tools").info("50 [bold]flags[/bold] %s", "x" * 60)
        logging.getLogger("other").info("not shown")
        logging.getLogger("other").warning("shown")
        logging.getLogger("other").warning("bad \x1b]0;title\x07\x1b[31m\nexample")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("mmsr_jax").setLevel(logging.NOTSET)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["50 [bold]flags[/bold] " + "x" * 60, "warning: shown"]
    assert lines[2:] == ["warning: bad  ]0;title  [31m", "example"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89.4, "89 s"), (421, "7 min"), (8000, "2 h 13 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
