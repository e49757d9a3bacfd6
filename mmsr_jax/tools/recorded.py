"""Between the tools and the services: the store, the budget, and calls that are made only once."""

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from mmsr_jax.tools.base import Tool, ToolError
from mmsr_jax.tools.budget import Budget, SearchStopped
from mmsr_jax.tools.hits import Finder, Found, Hit
from mmsr_jax.tools.store import Record, Store
from mmsr_jax.types import ResultItem, ToolCall

log = logging.getLogger(__name__)

Live = Callable[[], Awaitable[Found]]

# A provider that says so often in a row that our key or our account is no good means it. (A page
# that refuses us is nothing of the kind.)
REFUSALS = 20
REFUSING = frozenset({"unauthorized", "quota"})
MISSES = 20  # of a replay that has found nothing yet: the store is of another run
PROVIDERS = frozenset({"links", "lens"})  # kinds of requests that go to providers


@dataclasses.dataclass(frozen=True)
class Request:
    """What identifies a call: equal requests have equal answers. Holds no secrets."""

    kind: str  # the tool, or the stage of one
    provider: str
    content: Mapping[str, Any]  # JSON values; pictures by their sha256

    @property
    def text(self) -> str:
        """Canonical JSON."""
        whole = {"kind": self.kind, "provider": self.provider, **self.content}
        return json.dumps(whole, sort_keys=True, ensure_ascii=True, separators=(",", ":"))

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def write(found: Found) -> tuple[str, dict[str, bytes]]:
    """A response as JSON, and its pictures by sha256."""
    pictures: dict[str, bytes] = {}
    hits = []
    for hit in found.hits:
        entry = {k: v for k in ("title", "link", "text", "thumbnail") if (v := getattr(hit, k))}
        if hit.picture is not None:
            digest = hashlib.sha256(hit.picture).hexdigest()
            pictures[digest] = hit.picture
            entry["picture"] = digest
        hits.append(entry)
    return json.dumps({"hits": hits}, ensure_ascii=True), pictures


def read(record: Record) -> Found:
    """What a record answers. ToolError "failed" when a picture of it is gone."""
    hits = []
    for entry in json.loads(record.response)["hits"]:
        digest = entry.get("picture")
        if digest is not None and digest not in record.pictures:
            raise ToolError("failed", f"the store has lost picture {digest} of {record.key}")
        hits.append(
            Hit(
                entry.get("title", ""), entry.get("link", ""), entry.get("text", ""),
                entry.get("thumbnail", ""), None if digest is None else record.pictures[digest],
            )
        )  # fmt: skip
    return Found(
        tuple(hits), record.cost, 0.0, record.seconds, record.provider, "store", record.complete
    )


class Recorder:
    """Asks the store, else the service; equal calls in flight are one call.

    Recorded is what a service said: its hits, or that it has none. A failure is never recorded. An
    answer that a failure has made smaller (`Found.complete`) is recorded for replays only.

    Args:
      store: None keeps nothing; joining and the budget work all the same.
      mode: as in `StoreConfig`.
      ttl: age in seconds from which on a record counts as absent in mode `cache`; 0 for none.
    """

    def __init__(
        self,
        store: Store | None = None,
        mode: Literal["live", "cache", "replay"] = "cache",
        ttl: float = 0.0,
        budget: Budget | None = None,
    ):
        if mode == "replay" and store is None:
            raise ValueError("mode 'replay' needs a store")
        self.store, self.mode, self.budget = store, mode, budget or Budget()
        self._ttl = ttl
        self._flights: dict[str, asyncio.Task[Found]] = {}
        # One thread: sqlite may have to wait for another process, the event loop may not.
        self._disk = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search-store")
        self._refusals: dict[str, int] = {}  # in a row, by provider
        self._refused = ""  # why there is no use in going on
        names = ("live", "from_store", "joined", "recorded", "unrecorded", "failed", "missed")
        self._counters = dict.fromkeys(names, 0)

    async def ask(
        self, request: Request, live: Live, price: float = 0.0, whole: bool = False
    ) -> Found:
        """The answer to `request`, from the store or by `live`.

        A call in flight outlives the caller that gave up on it: it is paid for, so it is recorded.
        Who joined a call that ran out of its own caller's time asks once more, in the time it has
        itself. An answer that the store cannot take (a full disk) is an answer all the same.

        Args:
          price: US dollars that `live` costs itself, apart from what it asks this recorder for.
          whole: `live` calls no service but asks this recorder for its stages: it is no live call.

        Raises:
          ToolError: "not_recorded" in mode `replay`, "budget", or what `live` raises.
        """
        key = request.key
        if (flight := self._flights.get(key)) is not None:
            try:
                return await self._join(flight)
            except ToolError as error:
                if error.kind != "timeout":
                    raise
            if (flight := self._flights.get(key)) is not None:  # another one was faster
                return await self._join(flight)
        flight = asyncio.get_running_loop().create_task(self._fly(key, request, live, price, whole))
        self._flights[key] = flight
        flight.add_done_callback(lambda task: self._land(key, task))
        return await asyncio.shield(flight)

    async def _join(self, flight: "asyncio.Task[Found]") -> Found:
        self._counters["joined"] += 1
        return dataclasses.replace(await asyncio.shield(flight), paid=0.0, source="joined")

    async def recall(self, request: Request) -> Found:
        """What is recorded, of any age and in every mode: for what can be asked of nobody.

        Raises:
          ToolError: "not_recorded".
        """
        record = None
        if self.store is not None:
            record = await self._on_disk(self.store.get, request.key, 0.0, True)
        if record is None:
            raise self._missed(request)
        self._counters["from_store"] += 1
        return read(record)

    def _missed(self, request: Request) -> ToolError:
        """Counts a request that nobody may be asked for, and says so now and then."""
        self._counters["missed"] += 1
        missed = self._counters["missed"]
        if missed == 10 ** (len(str(missed)) - 1):  # 1, 10, 100, ...
            log.warning(
                "not recorded: %d requests, and %d were; the model reads an error instead of "
                "results (the last one: %s by %s)",
                missed, self._counters["from_store"], request.kind, request.provider,
            )  # fmt: skip
        return ToolError("not_recorded", f"{request.kind} by {request.provider}")

    def _land(self, key: str, task: "asyncio.Task[Found]") -> None:
        if self._flights.get(key) is task:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # seen, even when every caller has gone

    async def _fly(
        self, key: str, request: Request, live: Live, price: float, whole: bool
    ) -> Found:
        if self.store is not None and self.mode != "live":
            if (found := await self._look(key)) is not None:
                self._counters["from_store"] += 1
                return found
            if self.mode == "replay":
                raise self._missed(request)
        began = time.monotonic()
        self._counters["live"] += not whole
        try:
            with self.budget.hold(request.provider, price) as hold:
                found = await live()
                if price:
                    hold.cost = found.cost
        except Exception as error:
            self._counters["failed"] += not whole
            self._judge(request, error)
            raise
        self._judge(request, None)
        own = found.cost if price else 0.0
        found = dataclasses.replace(
            found, seconds=time.monotonic() - began, paid=found.paid + own, source="live"
        )
        if self.store is not None:
            response, pictures = write(found)
            record = Record(
                key, request.kind, request.provider, request.text, response, found.seconds,
                found.cost, own, time.time(), found.complete, pictures,
            )  # fmt: skip
            await self._keep(record)
        return found

    async def _keep(self, record: Record) -> None:
        try:
            # Shielded: what is paid for is written, also when the toolbox closes meanwhile.
            kept = await asyncio.shield(self._on_disk(self.store.put, record))
        except sqlite3.Error as error:
            kept = False
            log.warning("an answer of %s is not recorded: %s", record.provider, error)
        self._counters["recorded" if kept else "unrecorded"] += 1

    def _judge(self, request: Request, error: Exception | None) -> None:
        """Counts refusals of a provider, until it answers."""
        if request.kind not in PROVIDERS:
            return
        if error is None:
            self._refusals[request.provider] = 0
        elif isinstance(error, ToolError) and error.kind in REFUSING:
            count = self._refusals[request.provider] = self._refusals.get(request.provider, 0) + 1
            if count >= REFUSALS:
                self._refused = f"{request.provider} has refused {count} calls in a row ({error})"

    def check(self) -> None:
        """Raises SearchStopped when there is no use in going on.

        The money is spent, a provider takes us no more, or a replay finds nothing at all.
        """
        self.budget.check()
        missed = self._counters["missed"]
        if self.mode == "replay" and missed >= MISSES and not self._counters["from_store"]:
            raise SearchStopped(
                f"none of the first {missed} requests is recorded in {self.store.path}: replay the "
                "run that made it, with its own settings of tools, data and seed"
            )
        if self._refused:
            raise SearchStopped(
                f"{self._refused}. What was trained is saved; with a key and an account in order "
                "the same command continues"
            )

    async def _look(self, key: str) -> Found | None:
        replay = self.mode == "replay"
        age = 0.0 if replay else self._ttl
        try:
            record = await self._on_disk(self.store.get, key, age, replay)
        except sqlite3.Error as error:
            if replay:
                raise
            log.warning("%s cannot be read, the service is asked: %s", self.store.path, error)
            return None
        return None if record is None else read(record)

    def _on_disk(self, function, *arguments) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)

    def counters(self) -> dict[str, float]:
        """Totals since the start: calls to services that were `live` and those of them that
        `failed`; requests answered `from_store`, `joined` to one under way, and `missed` because
        nobody may be asked; answers `recorded`, and `unrecorded` because the store could not take
        them; `paid` and `paid_calls` are the budget's."""
        money = {"paid": self.budget.spent, "paid_calls": self.budget.calls}
        return self._counters | money

    def close(self) -> None:
        """Waits for what is being written, and closes the store."""
        self._disk.shutdown(wait=True)
        if self.store is not None:
            self.store.close()


class Recorded:
    """A tool behind a recorder. Wraps any `Tool`, also a local one.

    Args:
      tool: a `Tool`, or a `Finder`, which also knows costs.
      identity: what the answers depend on beside the call (settings, versions); a `Finder`
        knows its own.
      parts: the parts of a call that the answers depend on; by default picture for an image
        search, query and question for a text search.
    """

    def __init__(
        self,
        tool: Tool | Finder,
        recorder: Recorder,
        identity: Mapping[str, Any] | None = None,
        parts: tuple[str, ...] | None = None,
    ):
        self.name = tool.name
        self.provider = getattr(tool, "provider", "local")
        self._tool, self._recorder = tool, recorder
        self._identity = dict(getattr(tool, "identity", {}) if identity is None else identity)
        default = ("image",) if tool.name == "image_search" else ("query", "question")
        self._parts = default if parts is None else parts

    def request(self, call: ToolCall) -> Request:
        content: dict[str, Any] = {"identity": self._identity}
        for part in self._parts:
            value = getattr(call, part)
            content[part] = hashlib.sha256(value).hexdigest() if part == "image" else value
        return Request(self.name, self.provider, content)

    async def answer(self, call: ToolCall) -> Found:
        """The answer with its costs; no hits when there are none to be had."""
        pipeline = hasattr(self._tool, "find")
        return await self._recorder.ask(
            self.request(call), lambda: self._live(call), whole=pipeline
        )

    async def find(self, call: ToolCall) -> Found:
        """As `answer`, but ToolError "no_results" when there is none."""
        found = await self.answer(call)
        if not found.hits:
            raise ToolError("no_results")
        return found

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        return tuple(hit.item() for hit in (await self.find(call)).hits)

    async def _live(self, call: ToolCall) -> Found:
        try:
            if hasattr(self._tool, "find"):
                return await self._tool.find(call)
            items = await self._tool.run(call)
        except ToolError as error:
            if error.kind != "no_results":
                raise
            return Found((), provider=self.provider)
        hits = tuple(Hit(i.title, i.link, i.text, picture=i.thumbnail) for i in items)
        return Found(hits, provider=self.provider)
