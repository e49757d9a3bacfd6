"""What a run writes down and shows: metrics, trajectories, progress. No jax in here.

    log = RunLog("runs/flags")
    log.resume("grpo", 40)  # the checkpoint's place: what was logged beyond it is dropped
    with log.progress(120, "grpo", start=40) as bar:
        for step in range(41, 121):
            log.scalars(step, "grpo", {"reward/mean": 0.91})
            bar.advance({"reward": 0.91})

`metrics.jsonl` is the truth, one object a line; TensorBoard gets a copy, one run per stage.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

CONSOLE = Console(stderr=True)  # progress and log lines; results go to standard output
PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal

Record = dict[str, Any]


class RunLog:
    """One run's folder, as far as it is written line by line.

    Nothing is created before something is logged. Where many processes run the same program only
    one may write: the others set `primary = False`, and then every method does nothing.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, primary: bool = True, tensorboard: bool = True
    ):
        self.workdir = pathlib.Path(workdir)
        self.primary = primary
        self.begun = False  # has any work been logged or shown?
        self._tensorboard = tensorboard
        self._writers: dict[str, Any] = {}  # stage -> tensorboardX.SummaryWriter
        self._purge: dict[str, int] = {}  # stage -> first step that TensorBoard has to forget
        self._display: rich_progress.Progress | None = None
        self._whole = False  # does the metrics file end in a whole line?

    @property
    def metrics_file(self) -> pathlib.Path:
        return self.workdir / "metrics.jsonl"

    def resume(self, stage: str | None = None, step: int = 0) -> None:
        """Drops what was logged after `step` of `stage`; without a stage, everything.

        Call it once at the start, with the place of the checkpoint that was restored, or with
        nothing if there was none. Then each step stands in the metrics once, however often and
        wherever the run was killed. The file is replaced in one move: a kill loses nothing.
        """
        if not self.primary:
            return
        kept, dropped = _split(read_metrics(self.metrics_file), stage, step)
        for record in dropped:
            first = self._purge.get(record["stage"], record["step"])
            self._purge[record["stage"]] = min(first, record["step"])
        self._rewrite(kept)

    def scalars(self, step: int, stage: str, values: Mapping[str, Any]) -> None:
        """Appends one line: `{"step": 3, "stage": "grpo", "reward/mean": 0.91, ...}`.

        Values may be Python, numpy or jax scalars (or strings). What is not finite is written as
        null, since JSON knows no NaN.
        """
        self.begun = True
        if not self.primary:
            return
        if not self._whole:
            self._rewrite(read_metrics(self.metrics_file))
        plain = {name: _plain(value) for name, value in values.items()}
        _append(self.metrics_file, {"step": int(step), "stage": stage, **plain})
        if self._tensorboard:
            writer = self._writer(stage)
            for name, value in plain.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, int(step))

    def trajectories(self, step: int | str, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes `trajectories/STEP.jsonl`, one object a trajectory; replaces an older one."""
        self._file("trajectories", step, records)

    def traces(self, step: int | str, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes `traces/STEP.jsonl`: the trajectories' sizes and times (`report/trace.py`)."""
        self._file("traces", step, records)

    def print(self, *renderables: Any) -> None:
        """Shows a table or a line: on standard output, or above a running progress bar."""
        if self.primary:
            console = self._display.console if self._display else Console()
            plain = all(isinstance(one, str) for one in renderables)
            console.print(*renderables, markup=False, highlight=False, soft_wrap=plain)

    @contextlib.contextmanager
    def progress(self, total: int, description: str, start: int = 0) -> Iterator["Bar"]:
        """A progress bar from `start` to `total` steps; bars may be nested.

        On a terminal it is drawn by rich; elsewhere a line is printed about every ten seconds.
        """
        self.begun = True
        if not self.primary:
            yield Bar(total, description, start)
            return
        if not CONSOLE.is_terminal:
            yield PlainBar(total, description, start)
            return
        outermost = self._display is None
        if outermost:
            self._display = _display()
            self._display.start()
        task = self._display.add_task(description, total=total, completed=start, metrics="")
        try:
            yield RichBar(total, description, start, self._display, task)
        finally:
            if outermost:
                self._display.stop()
                self._display = None
            else:
                self._display.remove_task(task)

    def close(self) -> None:
        """Hands what TensorBoard still holds to the disk."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, folder: str, step: int | str, records: Iterable[Mapping[str, Any]]) -> None:
        self.begun = True
        if self.primary:
            path = self.workdir / folder / f"{step}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, records)

    def _rewrite(self, records: list[Record]) -> None:
        if self.metrics_file.exists():
            _replace(self.metrics_file, records)
        self._whole = True

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            import tensorboardX  # takes a second

            folder = str(self.workdir / "tensorboard" / stage)
            purge = self._purge.pop(stage, None)
            suffix = f".{time.time_ns()}"  # file names hold whole seconds only: a quick restart
            self._writers[stage] = tensorboardX.SummaryWriter(
                folder, purge_step=purge, flush_secs=10, filename_suffix=suffix
            )
        return self._writers[stage]


class Bar:
    """Counts steps; this one shows nothing, and is what all but the primary process get."""

    def __init__(self, total: int, description: str, start: int):
        self.total = total
        self.description = description
        self.start = start
        self.done = start

    def advance(self, metrics: Mapping[str, Any] | None = None, steps: int = 1) -> None:
        """Moves on by `steps`, with the figures to show behind the bar."""
        self.done += steps
        self._show(metrics or {})

    def _show(self, metrics: Mapping[str, Any]) -> None:
        pass


class RichBar(Bar):
    """A bar on a terminal."""

    def __init__(self, total, description, start, display: rich_progress.Progress, task):
        super().__init__(total, description, start)
        self._display = display
        self._task = task

    def _show(self, metrics: Mapping[str, Any]) -> None:
        self._display.update(self._task, completed=self.done, metrics=_postfix(metrics))


class PlainBar(Bar):
    """A line now and then, for logs: `grpo 12/120  reward 0.91  48 s, 7 min left`."""

    def __init__(self, total, description, start, clock=time.monotonic):
        super().__init__(total, description, start)
        self._clock = clock
        self._begin = clock()
        self._last = -math.inf

    def _show(self, metrics: Mapping[str, Any]) -> None:
        now = self._clock()
        if now - self._last < PLAIN_SECONDS and self.done < self.total:
            return
        self._last = now
        passed = now - self._begin
        left = passed / max(self.done - self.start, 1) * max(self.total - self.done, 0)
        times = f"{duration(passed)}, {duration(left)} left" if left else duration(passed)
        parts = [f"{self.description} {self.done}/{self.total}", _postfix(metrics), times]
        line = "  ".join(part for part in parts if part)
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


class LineHandler(logging.Handler):
    """Log records as plain lines on the console that the progress bars use."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        # Names and texts of strangers' data: escape sequences in them stay without effect.
        said = "".join(c if c.isprintable() or c == "\n" else " " for c in self.format(record))
        line = level + said
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


def show_log(debug: bool = False) -> None:
    """Sends Python's log records to the console: ours from INFO on, libraries' from WARNING on."""
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("mmsr_jax").setLevel(logging.DEBUG if debug else logging.INFO)


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The lines of `metrics.jsonl` in order; none if there is no file.

    A last line that a kill has torn is left out; a broken line before it is a ValueError.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    *whole, torn = path.read_bytes().split(b"\n")  # a whole file ends in a newline: torn is b""
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"]), "stage": str(record["stage"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no metrics record: {error}") from None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        record = json.loads(torn)  # perhaps only the newline is missing
        records.append({**record, "step": int(record["step"]), "stage": str(record["stage"])})
    return records


def duration(seconds: float) -> str:
    """48.2 -> "48 s", 421 -> "7 min", 8000 -> "2 h 13 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _split(records: list[Record], stage: str | None, step: int) -> tuple[list, list]:
    """Cuts where (stage, step) ends. Lines stand in the order of time, so one cut is enough."""
    if stage is None:
        return [], records
    cut = len(records)
    for index, record in enumerate(records):
        if record["stage"] == stage:
            if record["step"] > step:
                cut = min(cut, index)
                break
            cut = index + 1
    return records[:cut], records[cut:]


def _plain(value: Any) -> int | float | str | None:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return int(value) if isinstance(value, bool) else value


def _line(record: Mapping[str, Any]) -> bytes:
    """JSON and a newline. Half a surrogate pair (web pages hold such) becomes a question mark."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "replace")


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # opened anew: `resume` puts another file in its place
        file.write(_line(record))


def _replace(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file beside the old one and moves it over: readers see the old or the new."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        for record in records:
            file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _postfix(metrics: Mapping[str, Any]) -> str:
    shown = {name: _plain(value) for name, value in metrics.items()}
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )


def _display() -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[metrics]}", markup=False, style="cyan"),
        console=CONSOLE,
    )
