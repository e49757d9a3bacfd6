"""The tasks of `mmsr bench tools` that get a process of their own, for their time and memory."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import sys
import time

import numpy as np

from mmsr_jax.bench import tools_data, tools_load
from mmsr_jax.tools.index import manifest as manifests
from mmsr_jax.tools.index import vectors_exact, vectors_usearch
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import open_index
from mmsr_jax.tools.index.pictures import decoded
from mmsr_jax.tools.index.text import file_bytes
from mmsr_jax.tools.index.text_fts import FtsIndex


def main(argument: str) -> None:
    """Does one task and prints its figures as a line of JSON."""
    task = json.loads(argument)
    name = task.pop("task")
    figures = {"build": _build, "graph": _graph, "text": _text, "pictures": _pictures}[name](**task)
    print(json.dumps(figures | {"peak_rss": _peak()}))


def _build(source: str, out: str, text: str = "fts", vectors: str = "auto") -> dict:
    began = time.perf_counter()
    manifest, _ = build(source, out, IndexConfig(text, vectors), HashEmbedder())
    seconds = time.perf_counter() - began
    if manifest.skipped:
        raise RuntimeError(f"the generated source was not read whole: {manifest.skipped}")
    return {"seconds": seconds, "bytes": file_bytes(pathlib.Path(out))}


def _graph(index: str, out: str) -> dict:
    """The index of `index` again, with a graph over the same vectors."""
    source, target = pathlib.Path(index), pathlib.Path(out)
    shutil.copytree(source, target, copy_function=os.link)
    (target / manifests.FILE).unlink()
    manifest = manifests.read(source)
    part = manifest.pictures
    began = time.perf_counter()
    vectors_usearch.write(target, part.pictures, part.size)
    seconds = time.perf_counter() - began
    part = dataclasses.replace(part, back_end="usearch")
    manifests.write(target, dataclasses.replace(manifest, pictures=part))
    return {"seconds": seconds, "bytes": (target / vectors_usearch.FILE).stat().st_size}


def _text(
    index: str, questions: str, concurrency: list[int], seconds: float, topk: int, compared: int
) -> dict:
    asked = json.loads(pathlib.Path(questions).read_text())
    with open_index(index) as opened:
        text = opened.text
        in_process = {
            kind: {
                str(at_once): tools_load.load(
                    lambda: lambda question: text.scored(question, topk),
                    asked[kind], at_once, seconds,
                )
                for at_once in concurrency
            }
            for kind in ("entity", "words")
        }  # fmt: skip
        found = [
            link in {passage.link for passage in text.search(question, topk)}
            for question, link in zip(asked["entity"], asked["entity_links"], strict=True)
        ]
        quality = {"own_article_found": float(np.mean(found))}
        peak = _peak()
        if isinstance(text, FtsIndex):
            whole = FtsIndex(pathlib.Path(index), max_candidates=None)
            for kind in ("entity", "words"):
                quality[f"recall_{kind}"], quality[f"whole_ms_{kind}"] = _recall(
                    text, whole, asked[kind][:compared], topk
                )
    return {"in_process": in_process, "quality": quality, "search_peak_rss": peak}


def _recall(some, whole, questions: list[str], topk: int) -> tuple[float, float]:
    """Share of the best articles that are found, and the milliseconds of finding all (median)."""
    shares, taken = [], []
    for question in questions:
        began = time.perf_counter()
        best = {passage.link for passage in whole.search(question, topk)}
        taken.append(time.perf_counter() - began)
        found = {passage.link for passage in some.search(question, topk)}
        shares.append(len(best & found) / max(1, len(best)))
    return float(np.mean(shares)), 1e3 * float(np.median(taken))


def _pictures(index: str, pictures: int, concurrency: list[int], seconds: float, topk: int) -> dict:
    embedder = HashEmbedder()
    numbers = list(range(0, pictures, max(1, pictures // 500)))
    again = [tools_data.picture(number, seen_again=True) for number in numbers]
    vectors = [embedder.embed([decoded(data)])[0] for data in again]
    with open_index(index) as opened:
        index_, part = opened.pictures, opened.manifest.pictures
        figures = {
            name: {
                str(at_once): tools_load.load(lambda ask=ask: ask, questions, at_once, seconds)
                for at_once in concurrency
            }
            for name, ask, questions in (
                ("in_process", lambda data: index_.scored(data, topk), again),
                ("vector", lambda vector: index_.vectors.nearest(vector, topk), vectors),
            )
        }
        figures["search_peak_rss"] = _peak()
        exact = vectors_exact.ExactVectors(pathlib.Path(index), part.pictures, part.size)
        shares, first = [], []
        for number, vector in zip(numbers, vectors, strict=True):
            best = set(exact.nearest(vector, topk)[0].tolist())
            found = index_.vectors.nearest(vector, topk)[0].tolist()
            shares.append(len(best & set(found)) / len(best))
            first.append(found[0] == number)
    figures["quality"] = {"recall": float(np.mean(shares)), "right_first": float(np.mean(first))}
    return figures


def _peak() -> int:
    """Peak resident set of this process in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # what getrusage says begins, on Linux, with the peak of the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
