"""Searches an index for a while, from many threads, in this process or over HTTP."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

WARM = 20  # questions asked before the clock runs


def load(
    connect: Callable[[], Callable[[object], None]],
    questions: Sequence[object],
    concurrency: int,
    seconds: float,
) -> dict[str, float]:
    """Asks again and again; every thread waits for its answer before it asks the next.

    Args:
        connect: makes what one thread asks with.
        concurrency: threads.

    Returns: p50_ms, p99_ms, max_ms, per_second, the number of answers, and cpu_p50_ms: what the
        asking thread itself worked, whatever else goes on on the machine (over HTTP that is the
        client alone).

    Raises:
        RuntimeError: a question failed.
    """
    ask = connect()
    for question in questions[:WARM]:
        ask(question)
    taken: list[list[tuple[float, float]]] = [[] for _ in range(concurrency)]
    failed: list[BaseException] = []
    begin = threading.Barrier(concurrency + 1)

    def work(number: int) -> None:
        at, ask = number, connect()
        begin.wait()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            worked = time.thread_time()
            try:
                ask(questions[(WARM + at) % len(questions)])
            except Exception as error:
                failed.append(error)
                return
            taken[number].append((time.perf_counter() - began, time.thread_time() - worked))
            at += concurrency

    threads = [threading.Thread(target=work, args=(number,)) for number in range(concurrency)]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    if failed:
        raise RuntimeError(f"{len(failed)} of {concurrency} threads failed: {failed[0]!r}")
    times, cpu = np.concatenate([np.array(each).reshape(-1, 2) for each in taken]).T
    return {
        "p50_ms": 1e3 * float(np.percentile(times, 50)),
        "p99_ms": 1e3 * float(np.percentile(times, 99)),
        "max_ms": 1e3 * float(times.max()),
        "per_second": len(times) / wall,
        "answers": len(times),
        "cpu_p50_ms": 1e3 * float(np.percentile(cpu, 50)),
    }


def http_text(port: int, topk: int) -> Callable[[], Callable[[object], None]]:
    """Asks POST /retrieve, one connection a thread, one question a request."""

    def body(question):
        return json.dumps({"queries": [question], "topk": topk, "return_scores": True}).encode()

    return _http(port, "/retrieve", body, "application/json")


def http_picture(port: int, topk: int) -> Callable[[], Callable[[object], None]]:
    """Asks POST /image with the bytes of a picture."""
    return _http(port, f"/image?topk={topk}", lambda picture: picture, "image/jpeg")


def _http(port: int, path: str, body, kind: str):
    def connect():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

        def ask(question) -> None:
            connection.request("POST", path, body(question), {"Content-Type": kind})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {said[:200]!r}")

        return ask

    return connect
