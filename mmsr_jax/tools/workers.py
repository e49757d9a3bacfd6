"""Child processes that parse pages, and are killed when they take too long."""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import struct
import sys

from mmsr_jax.tools.base import ToolError

PROGRAM = pathlib.Path(__file__).with_name("parsing.py")
MAX_JOBS = 500  # then a fresh process: parsers leak
MAX_ANSWER = 64 << 20
CPU_SECONDS = 8.0  # for a page, where its deadline is longer: two of a stranger's stop all others
# What a Python needs to start. Keys in the environment are none of a parser's business.
ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "SYSTEMROOT",
    "TMPDIR",
)


class Parsers:
    """A pool of parser processes, started when first needed. For one event loop.

    Args:
        size: processes, and so pages parsed at the same time.
        memory: bytes of address space that a process may use.
    """

    def __init__(self, size: int = 2, memory: int = 1 << 30):
        if size < 1:
            raise ValueError(f"a pool needs at least 1 parser, not {size}")
        self._memory = memory
        self._slots = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def parse(
        self,
        kind: str,
        body: bytes,
        *,
        deadline: float,
        charset: str = "",
        max_pages: int = 30,
        max_chars: int = 200_000,
    ) -> tuple[str, str]:
        """Title and text of a page, see `parsing.parse`.

        Args:
            deadline: seconds, waiting for a free process included. The page itself gets no more
                than `CPU_SECONDS` and two of a core.

        Raises:
            ToolError: "timeout"; "no_text"; "too_large" for memory; "bad_response" for a page that
                cannot be read, or that ends its parser; "failed" when somebody killed the parser.
        """
        job = {
            "kind": kind,
            "charset": charset,
            "max_pages": max_pages,
            "max_chars": max_chars,
            "memory": self._memory,
            "seconds": min(deadline, CPU_SECONDS),
            "length": len(body),
        }
        try:
            async with asyncio.timeout(deadline), self._slots:
                reply = await self._ask(job, body)
        except TimeoutError:
            text = f"{deadline:.1f} s are over, parsing {len(body)} bytes of {kind}"
            raise ToolError("timeout", text) from None
        if "error" in reply:
            raise ToolError(reply["error"], reply["message"])
        return reply["title"], reply["text"]

    async def _ask(self, job: dict, body: bytes) -> dict:
        worker = self._idle.pop() if self._idle else await self._start()
        try:
            reply = await worker.ask(job, body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            gone = not isinstance(error, ValueError)
            if gone and await worker.ended() == -signal.SIGKILL:  # the kernel's, short of memory
                raise ToolError("failed", "the parser was killed from outside") from None
            raise ToolError("bad_response", "the page ends its parser") from None
        else:
            if worker.jobs < MAX_JOBS:
                self._idle.append(worker)
            return reply
        finally:
            if worker not in self._idle:
                worker.kill()
                self._all.discard(worker)

    async def _start(self) -> "_Worker":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # or this folder's `http.py` would stand before the library's `http`
            str(PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        worker = _Worker(process)
        self._all.add(worker)
        return worker

    async def close(self) -> None:
        """Ends all processes."""
        workers, self._all, self._idle = list(self._all), set(), []
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.process.wait()


class _Worker:
    """One parser process."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.process, self.jobs = process, 0

    async def ask(self, job: dict, body: bytes) -> dict:
        self.jobs += 1
        head = json.dumps(job).encode()
        self.process.stdin.write(struct.pack(">Q", len(head)) + head + body)
        await self.process.stdin.drain()
        size = struct.unpack(">Q", await self.process.stdout.readexactly(8))[0]
        if size > MAX_ANSWER:
            raise ValueError(f"an answer of {size} bytes")
        return json.loads(await self.process.stdout.readexactly(size))

    async def ended(self) -> int | None:
        """How the process ended, if it does so now: an exit status, or minus a signal."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                return await self.process.wait()
        return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
