"""`mmsr bench tools`: local search at a million passages and a hundred thousand pictures.

Every index is built in a process of its own (seconds, peak memory) and then searched in a process
and over HTTP. Each approximation is compared with what it approximates.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time

from mmsr_jax.bench import tools_data, tools_load

log = logging.getLogger(__name__)

CHILD = "import sys; from mmsr_jax.bench import tools_child; tools_child.main(sys.argv[1])"
SERVE = "import sys; from mmsr_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
PACKAGES = ("tantivy", "usearch", "starlette", "uvicorn", "numpy", "pillow", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    passages: int = 1_000_000
    pictures: int = 100_000
    text: tuple[str, ...] = ("fts", "tantivy")
    vectors: tuple[str, ...] = ("exact", "usearch")
    concurrency: tuple[int, ...] = (1, 32)
    seconds: float = 10.0  # of each measurement of latency
    topk: int = 10
    compared: int = 40  # questions of each kind for which an approximation is compared
    folder: str | None = None  # where files may lie; None is the system's temporary folder

    def __post_init__(self):
        if min(self.passages, self.pictures, self.topk, self.compared, *self.concurrency) < 1:
            raise ValueError("passages, pictures, topk, compared, concurrency: at least 1 each")
        for given, known in ((self.text, ("fts", "tantivy")), (self.vectors, ("exact", "usearch"))):
            if unknown := set(given) - set(known):
                raise ValueError(f"no back end {min(unknown)!r}, only {', '.join(known)}")


def run(options: Options) -> dict:
    """Generates, builds, searches, and removes everything again. Figures in seconds and bytes."""
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = pathlib.Path(made)
        began = time.perf_counter()
        tools_data.write_passages(folder / "passages.parquet", options.passages)
        tools_data.write_pictures(folder / "pictures.parquet", options.pictures)
        generated = time.perf_counter() - began
        text = {name: _text(folder, name, options) for name in options.text}
        pictures = _pictures(folder, options)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "nice": os.nice(0),
        "versions": _versions(),
        "options": dataclasses.asdict(options),
        "generate_seconds": generated,
        "text": text,
        "pictures": pictures,
    }


def _text(folder: pathlib.Path, name: str, options: Options) -> dict:
    out = folder / name
    figures = {
        "build": _child(
            task="build", source=str(folder / "passages.parquet"), out=str(out), text=name
        )
    }
    asked = {
        "task": "text", "index": str(out), "questions": str(folder / "questions.json"),
        "concurrency": options.concurrency, "seconds": options.seconds, "topk": options.topk,
        "compared": options.compared,
    }  # fmt: skip
    figures |= _child(**asked)
    questions = json.loads((folder / "questions.json").read_text())
    with _Server(out) as server:
        figures["http"] = {
            kind: {
                str(at_once): tools_load.load(
                    tools_load.http_text(server.port, options.topk),
                    questions[kind], at_once, options.seconds,
                )
                for at_once in options.concurrency
            }
            for kind in ("entity", "words")
        }  # fmt: skip
        figures["server_peak_rss"] = server.peak_rss()
    return figures


def _pictures(folder: pathlib.Path, options: Options) -> dict:
    exact = folder / "exact"
    figures: dict = {
        "build": _child(
            task="build", source=str(folder / "pictures.parquet"), out=str(exact), vectors="exact"
        )
    }
    again = [
        tools_data.picture(number, seen_again=True)
        for number in range(0, options.pictures, max(1, options.pictures // 500))
    ]
    for name in options.vectors:
        out = folder / name
        if name == "usearch":
            figures["graph"] = _child(task="graph", index=str(exact), out=str(out))
        shared = {
            "task": "pictures", "index": str(out), "pictures": options.pictures,
            "concurrency": options.concurrency, "seconds": options.seconds, "topk": options.topk,
        }  # fmt: skip
        figures[name] = _child(**shared)
        with _Server(out) as server:
            figures[name]["http"] = {
                str(at_once): tools_load.load(
                    tools_load.http_picture(server.port, options.topk),
                    again, at_once, options.seconds,
                )
                for at_once in options.concurrency
            }  # fmt: skip
            figures[name]["server_peak_rss"] = server.peak_rss()
    return figures


def _child(**task) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(task)],
        env=_environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process for {task} failed:\n{done.stderr[-2000:]}")
    log.info("%s: %s", task, done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


class _Server:
    """`mmsr search serve` in a process of its own."""

    def __init__(self, index: pathlib.Path):
        self._index = index

    def __enter__(self) -> "_Server":
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "search", "serve", str(self._index), "--port", "0"],
            env=_environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self._process.stdout.readline()
        if not line.startswith("serving"):
            self._process.wait()
            raise RuntimeError(f"the server over {self._index} did not start: {line!r}")
        self.port = int(line.rpartition(":")[2])
        return self

    def peak_rss(self) -> int | None:
        """Bytes; mapped pages of the index that were read are among them. None if not on Linux."""
        status = pathlib.Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def __exit__(self, *exc_info: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)
        self._process.stdout.close()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _machine() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines.items()}
        name = (
            f"{facts.get('model name', name)} (family {facts.get('cpu family')}, "
            f"model {facts.get('model')})"
        )
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(record: dict) -> str:
    """The figures for a reader."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{record['machine']}, niceness {record['nice']}, {record['date']}", versions]
    for name, part in record["text"].items():
        lines += [_built(f"{record['options']['passages']:,} passages, {name}", part["build"])]
        for kind in ("entity", "words"):
            lines += _latencies(f"{name}, {kind}", part["in_process"][kind], part["http"][kind])
        lines.append(f"  {name}: " + json.dumps(part["quality"]))
    pictures = record["pictures"]
    lines.append(_built(f"{record['options']['pictures']:,} pictures", pictures["build"]))
    if "graph" in pictures:
        lines.append(_built("  graph by usearch", pictures["graph"]))
    for name in record["options"]["vectors"]:
        part = pictures[name]
        lines += _latencies(name, part["in_process"], part["http"])
        lines += _latencies(f"{name}, vector alone", part["vector"], {})
        lines.append(f"  {name}: " + json.dumps(part["quality"]))
    return "\n".join(lines)


def _built(name: str, build: dict) -> str:
    return (
        f"{name}: {build['seconds']:.1f} s, {build['bytes'] / 1e6:,.0f} MB on disk, "
        f"peak {build['peak_rss'] / 1e6:,.0f} MB"
    )


def _latencies(name: str, inside: dict, http: dict) -> list[str]:
    lines = []
    for where, cells in (("in process", inside), ("HTTP", http)):
        for at_once, cell in cells.items():
            lines.append(
                f"  {name:24} {where:10} {at_once:>3} at once: p50 {cell['p50_ms']:8.2f} ms  "
                f"p99 {cell['p99_ms']:8.2f} ms  {cell['per_second']:8.1f} a second"
            )
    return lines
