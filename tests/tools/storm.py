"""A fault storm, in processes of its own: a server that fails, and a run that calls it.

    python tests/tools/storm.py server SEED          prints its address; GET /stats tells its counts
    python tests/tools/storm.py client URL STORE LOG CALLS DISTINCT

The server speaks Serper's /search; three of ten answers are faults of nine kinds. The client
makes CALLS calls over DISTINCT queries, 64 at a time, through toolbox, recorder, store, pipeline,
provider and HTTP client; every ended call is a line of LOG.
"""

import asyncio
import collections
import json
import pathlib
import random
import sys
import threading
import time

from fault_server import FaultServer, path, reset, response

from mmsr_jax.tools.assembly import WebConfig, assemble
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.http import HttpConfig
from mmsr_jax.tools.limits import Limits
from mmsr_jax.tools.providers.serper import SerperConfig
from mmsr_jax.tools.store import StoreConfig
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ToolCall

# Each fault, and the name under which a call ends that nothing better came to.
FAULTS = {
    "401": "unauthorized", "402": "quota", "429": "rate_limited", "500": "server_error",
    "hang": "timeout", "reset": "unreachable", "truncated": "bad_response",
    "type": "bad_response", "empty": "bad_response",
}  # fmt: skip
MENDED = ("429", "500", "reset")  # the client tries again after these
SHARE = 0.3
AT_ONCE = 64
WEB_DEADLINE, DEADLINE = 3.0, 4.0
HOLD = 0.05  # seconds that a 429 asks for: they hold all calls, and there are 200 of them


def truth(query: str) -> dict:
    """The answer to a query: nothing for one in ten."""
    number = int(query.rpartition(" ")[2])
    organic = [
        {"title": f"{query} title {n}", "link": f"https://a.example/{number}/{n}",
         "snippet": f"snippet {n} of {query} " + "x" * 200, "position": n}
        for n in range(0 if number % 10 == 0 else 5)
    ]  # fmt: skip
    return {"searchParameters": {"q": query}, "organic": organic, "credits": 1}


async def serve(seed: int) -> None:
    dice = random.Random(seed)
    faults: collections.defaultdict = collections.defaultdict(list)  # the queries it met
    good: collections.Counter = collections.Counter()

    async def handler(head, reader, writer):
        if path(head) == "/stats":
            writer.write(response(200, json.dumps({"faults": faults, "good": good}).encode()))
            return
        query = json.loads(server.bodies[-1])["q"]
        server.bodies.clear()
        server.heads.clear()
        await asyncio.sleep(dice.uniform(0, 0.02))
        if dice.random() >= SHARE:
            good[query] += 1
            writer.write(response(200, json.dumps(truth(query)).encode()))
            return
        fault = dice.choice(tuple(FAULTS))
        faults[fault].append(query)
        body = json.dumps(truth(query)).encode()
        if fault == "hang":
            await asyncio.sleep(30)
        elif fault == "reset":
            writer.write(response(200, body)[:-20])
            await writer.drain()
            reset(writer)
        elif fault == "truncated":
            writer.write(response(200, body[: len(body) // 2]))
        elif fault == "type":
            writer.write(response(200, b"<html>sorry</html>", "text/html"))
        elif fault == "empty":
            writer.write(response(200, b""))
        elif fault == "429":
            writer.write(response(429, b'{"message": "slow down"}', Retry_After=HOLD))
        else:
            writer.write(response(int(fault), b'{"message": "no"}'))

    server = FaultServer(handler)
    async with server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def rss() -> int:
    """Memory of this process, in MB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("no VmRSS")


def client(url: str, store: str, log: str, calls: int, distinct: int) -> dict:
    """Makes the calls; returns counts."""
    limits = Limits(rate=100_000, burst=1000, concurrency=128)
    web = WebConfig(
        text="serper", read=False, deadline=WEB_DEADLINE, serper=SerperConfig(url=url),
        http=HttpConfig(retries=2, backoff=0.02, limits={"serper": limits}),
    )  # fmt: skip
    search = assemble(
        "web", web, StoreConfig(store), BudgetConfig(), image_results=5, text_results=5,
        deadline=DEADLINE, local=dict, local_identity={}, only="text_search",
    )  # fmt: skip
    outcomes: collections.Counter = collections.Counter()
    wrong: list[str] = []
    seconds: list[float] = []
    memory: list[int] = []
    room, lock = threading.Semaphore(AT_ONCE), threading.Lock()
    dice = random.Random(1)
    began = time.monotonic()
    with (
        open(log, "a", buffering=1) as lines,
        Toolbox(search.tools, DEADLINE, AT_ONCE, closing=search.close) as toolbox,
    ):

        def ended(number, query, future):
            result = future.result()
            kind = (result.error or "items").partition(":")[0]
            if result.error is None:
                expected = [o["snippet"] for o in truth(query)["organic"]]
                if [i.text for i in result.items] != expected:
                    wrong.append(query)
            elif kind == "no_results" and truth(query)["organic"]:
                wrong.append(query)
            with lock:
                outcomes[kind] += 1
                seconds.append(result.seconds)
                if len(seconds) % 1000 == 0:
                    memory.append(rss())
                lines.write(json.dumps([number, query, kind, result.error, result.seconds]) + "\n")
            room.release()

        for number in range(calls):
            query = f"query {dice.randrange(distinct)}"
            room.acquire()
            future = toolbox.submit(ToolCall("text_search", query, b"", "?"))
            future.add_done_callback(lambda f, n=number, q=query: ended(n, q, f))
        for _ in range(AT_ONCE):
            room.acquire()
        while search.recorder._flights:  # what callers have given up on ends too
            time.sleep(0.01)
        counters = search.counters()
        prefix = "serper/faults/"
        tries = {n.removeprefix(prefix): c for n, c in search._http.counters().items()
                 if n.startswith(prefix)}  # fmt: skip
    over = sorted(s - DEADLINE for s in seconds if s >= DEADLINE)
    return {
        "calls": calls, "outcomes": dict(outcomes), "wrong": wrong, "tries": tries,
        "longest": round(max(seconds), 4), "over": len(over), "memory_mb": memory,
        "seconds": round(time.monotonic() - began, 1), **counters,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(serve(int(sys.argv[2])))
    else:
        url, store, log, calls, distinct = sys.argv[2:]
        print(json.dumps(client(url, store, log, int(calls), int(distinct))), flush=True)
