"""A store that is locked, damaged or about to close: answers are neither late nor lost."""

import asyncio
import sqlite3
import threading
import time

import pytest

from mmsr_jax.tools import store_file
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.recorded import Recorded, Recorder, Request
from mmsr_jax.tools.store import Store
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ResultItem, ToolCall


class Local:
    """A tool that finds one thing."""

    name = "text_search"

    async def run(self, call):
        return (ResultItem("Nepal"),)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s.db")
    yield made
    made.close()


def test_a_lock_that_is_held_for_long_is_waited_for_once(tmp_path, monkeypatch):
    """All calls stand behind a writer that waits: if each of them did, all would be late."""
    monkeypatch.setattr(store_file, "BUSY_SECONDS", 0.5)
    store = Store(tmp_path / "s.db")
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    recorder = Recorder(store)
    with Toolbox({"text_search": Recorded(Local(), recorder)}, 4.0) as box:

        def ask(n):
            return box.submit(ToolCall("text_search", str(n), b"", ""))

        other.execute("BEGIN IMMEDIATE")
        assert [f.result().error for f in [ask(n) for n in range(30)]] == [None] * 30
        assert recorder.counters()["unrecorded"] == 30
        other.execute("ROLLBACK")
        assert ask(30).result().error is None and recorder.counters()["recorded"] == 1
    assert store._db.execute("PRAGMA busy_timeout").fetchone() == (500,)
    recorder.close()


def test_a_store_that_cannot_be_read_asks_the_service(store, monkeypatch, caplog):
    def damaged(*_):
        raise sqlite3.DatabaseError("database disk image is malformed")

    found = Found((Hit("Nepal"),))
    asked = Request("links", "serper", {"query": "Nepal"})

    async def service():
        return found

    async def main():
        monkeypatch.setattr(Store, "get", damaged)
        assert (await Recorder(store).ask(asked, service)).hits == found.hits
        with pytest.raises(sqlite3.DatabaseError):
            await Recorder(store, "replay").ask(asked, service)

    asyncio.run(main())
    assert "cannot be read, the service is asked: database disk image" in caplog.text


def test_what_is_paid_for_is_written_when_the_toolbox_closes(store, monkeypatch):
    put, writing, go_on = store.put, threading.Event(), threading.Event()

    def slow(record):
        writing.set()
        go_on.wait(30)
        return put(record)

    monkeypatch.setattr(store, "put", slow)
    recorder = Recorder(store, "live")

    async def closing():
        go_on.set()
        recorder._disk.shutdown(wait=True)

    with Toolbox({"t": Recorded(Local(), recorder)}, closing=closing) as box:
        for n in range(3):  # the first is being written, the others wait for it
            box.submit(ToolCall("t", str(n), b"", ""))
        assert writing.wait(30)
        while recorder._disk._work_queue.qsize() < 2:
            time.sleep(0.01)
    assert len(list(store.records())) == 3
