"""The store keeps what it was given, whole, for several processes, within its size."""

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from mmsr_jax.tools import fvqa_cache
from mmsr_jax.tools.store import FLUSH_EVERY, Record, Store, StoreConfig


def record(name: str, pictures: tuple[bytes, ...] = (), **more) -> Record:
    key = hashlib.sha256(name.encode()).hexdigest()
    shown = {hashlib.sha256(p).hexdigest(): p for p in pictures}
    values = {"created": time.time(), "cost": 0.5, "paid": 0.25, "seconds": 1.5} | more
    return Record(key, "links", "serper", f'{{"query": "{name}"}}', f'["{name}"]', **values,
                  pictures=shown)  # fmt: skip


def test_a_record_comes_back_as_it_was_also_after_reopening(tmp_path):
    given = record("a", (b"one", b"two"))
    with_none = record("b")
    store = Store(tmp_path / "deep" / "s.db")
    assert store.get(given.key) is None
    store.put(given)
    store.put(with_none)
    assert store.get(given.key) == given
    store.close()
    store.close()
    again = Store(tmp_path / "deep" / "s.db")
    assert (again.get(given.key), again.get(with_none.key)) == (given, with_none)
    assert again.check() == []
    again.close()


def test_old_and_incomplete_records_are_for_replays(tmp_path):
    store = Store(tmp_path / "s.db")
    old = record("old", created=time.time() - 100)
    part = record("part", complete=False)
    store.put(old)
    store.put(part)
    assert store.get(old.key) and store.get(old.key, max_age=101)
    assert store.get(old.key, max_age=99) is None
    assert store.get(old.key, max_age=99, replay=True) == old
    assert store.get(part.key) is None
    assert store.get(part.key, replay=True) == part
    whole = record("part", (b"x",))
    store.put(whole)
    store.put(part)  # comes late, and changes nothing
    assert store.get(part.key) == whole and store.check() == []


def test_pictures_are_kept_once_and_go_with_their_last_record(tmp_path):
    store = Store(tmp_path / "s.db")
    store.put(record("a", (b"shared", b"own")))
    store.put(record("b", (b"shared",)))
    assert store.summary()["pictures"] == 2
    store.put(record("a"))  # shows none any more
    assert store.summary()["pictures"] == 1
    store.put(record("b"))
    assert store.summary()["pictures"] == 0 and store.check() == []


def test_a_picture_under_a_wrong_name_is_refused(tmp_path):
    store = Store(tmp_path / "s.db")
    wrong = record("a")
    wrong.pictures["0" * 64] = b"x"
    with pytest.raises(ValueError, match="picture of 1 bytes is not 0000"):
        store.put(wrong)
    assert store.get(wrong.key) is None


def test_the_least_recently_used_make_room(tmp_path):
    store = Store(tmp_path / "s.db", max_bytes=40_000)
    for n in range(8):
        store.put(record(str(n), (str(n).encode() * 4000,)))
    assert store.get(record("0").key) is not None  # used again: others are older now
    for n in range(8, 12):
        store.put(record(str(n), (str(n).encode() * 2000,)))
    kept = {n for n in range(12) if store.get(record(str(n)).key) is not None}
    assert {0, 11} <= kept and 1 not in kept
    summary = store.summary()
    assert summary["bytes"] <= 40_000 and summary["evicted"] == 12 - len(kept)
    assert store.check() == []


def test_summary_counts_uses_and_money(tmp_path):
    store = Store(tmp_path / "s.db")
    store.put(record("a"))
    for _ in range(3):
        store.get(record("a").key)
    store.get(record("b").key)
    summary = store.summary()
    (kind,) = summary["kinds"]
    assert (kind["kind"], kind["provider"], kind["records"], kind["hits"]) == (
        "links", "serper", 1, 3,
    )  # fmt: skip
    assert (kind["paid"], kind["saved"]) == (0.25, 1.5)
    assert (summary["hits"], summary["misses"], summary["paid"]) == (3, 1, 0.25)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("this is no database at all, but a text of some length")
    with pytest.raises(ValueError, match="is no store"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="is a database, but no store"):
        Store(tmp_path / "other.db")
    Store(tmp_path / "new.db").close()
    with sqlite3.connect(tmp_path / "new.db") as new:
        new.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match=r"version 7, this program reads 1"):
        Store(tmp_path / "new.db")
    with pytest.raises(ValueError, match="there is no store"):
        Store(tmp_path / "nowhere.db", write=False)
    assert not (tmp_path / "nowhere.db").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ttl": -1}, "not -1"), ({"max_bytes": -5}, "not -5"), ({"mode": "replay"}, "no store")],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StoreConfig(**options)


def test_a_record_that_would_fill_the_store_is_not_kept_and_none_is_lost_for_it(tmp_path):
    store = Store(tmp_path / "s.db", max_bytes=10_000)
    for n in range(3):
        assert store.put(record(str(n), (str(n).encode() * 2000,)))
    assert not store.put(record("big", (b"x" * 9_500,)))
    assert all(store.get(record(str(n)).key) for n in range(3))
    assert store.get(record("big").key) is None and store.check() == []


def test_what_was_just_written_is_never_evicted(tmp_path):
    store = Store(tmp_path / "s.db", max_bytes=10_000)
    store.put(record("old", (b"o" * 8_000,)))
    for _ in range(20):
        store.get(record("old").key)
    store._uses[record("old").key][0] = time.time() + 100  # as by a clock that is set back later
    assert store.put(record("new", (b"n" * 8_000,)))
    assert store.get(record("new").key) is not None and store.get(record("old").key) is None


def test_results_that_nobody_can_give_again_are_never_evicted(tmp_path):
    store = Store(tmp_path / "s.db", max_bytes=20_000)
    kept = dataclasses.replace(record("fvqa", (b"f" * 5000,)), provider=fvqa_cache.PROVIDER)
    store.put(kept)
    for n in range(8):
        store.put(record(str(n), (str(n).encode() * 4000,)))
    assert store.get(kept.key, replay=True) == kept
    assert store.summary()["evicted"] > 3 and store.check() == []


def test_a_count_that_cannot_be_written_does_not_cost_the_record(tmp_path, monkeypatch):
    store = Store(tmp_path / "s.db")
    store.put(record("a"))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_uses", failing)
        for n in range(FLUSH_EVERY + 3):
            store.get(record(f"not there {n}").key)
            assert store.get(record("a").key) is not None
    assert store.summary()["hits"] == FLUSH_EVERY + 3  # they are written down later


def failing(*_):
    raise sqlite3.OperationalError("database or disk is full")


def test_a_store_that_is_only_read_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="there is no store"):
        Store(tmp_path / "s.db", write=False)
    store = Store(tmp_path / "s.db")
    store.put(record("a", (b"one",)))
    store.close()
    before = (tmp_path / "s.db").read_bytes()
    reading = Store(tmp_path / "s.db", write=False)
    for _ in range(2 * FLUSH_EVERY):
        assert reading.get(record("a").key).pictures
        reading.get(record("b").key)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reading.put(record("b"))
    assert reading.summary()["records"] == 1 and reading.check() == []
    reading.close()
    assert (tmp_path / "s.db").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is write-protected for root")
def test_a_write_protected_store_is_read_and_named(tmp_path):
    (tmp_path / "deep").mkdir()
    store = Store(tmp_path / "deep" / "s.db")
    store.put(record("a"))
    store.close()
    (tmp_path / "deep" / "s.db").chmod(0o444)
    (tmp_path / "deep").chmod(0o555)
    try:
        reading = Store(tmp_path / "deep" / "s.db", write=False)
        assert reading.get(record("a").key) is not None
        reading.close()
        with pytest.raises(ValueError, match="cannot be opened: .*replay"):
            Store(tmp_path / "deep" / "s.db")
    finally:
        (tmp_path / "deep").chmod(0o755)


def test_closing_gives_free_pages_back(tmp_path):
    store = Store(tmp_path / "s.db")
    for n in range(20):
        store.put(record(str(n), (str(n).encode() * 50_000,)))
    for n in range(20):
        store.put(record(str(n)))
    store.close()
    assert (tmp_path / "s.db").stat().st_size < 200_000


def write_many(path, name, count):
    store = Store(path)
    for n in range(count):
        store.put(record(f"{name}{n}", (f"{name}{n}".encode(), b"shared")))
        assert store.get(record(f"{name}{n}").key) is not None
    store.close()


def test_several_processes_write_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=write_many, args=(tmp_path / "s.db", name, 40)) for name in "abc"
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    store = Store(tmp_path / "s.db")
    for name in "abc":
        assert all(store.get(record(f"{name}{n}").key) for n in range(40))
    assert store.summary()["pictures"] == 121 and store.check() == []


WRITER = """
import hashlib, sys, time
from mmsr_jax.tools.store import Record, Store
store = Store(sys.argv[1])
for n in range(100_000):
    key = hashlib.sha256(str(n).encode()).hexdigest()
    picture = str(n).encode() * 2000
    digest = hashlib.sha256(picture).hexdigest()
    store.put(Record(key, "links", "p", str(n), digest, 0.0, 0.0, 0.0, time.time(),
                     pictures={digest: picture}))
    print(n, flush=True)
"""


def test_killed_in_the_middle_nothing_is_lost_and_nothing_is_half_there(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "s.db")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = [child.stdout.readline() for _ in range(60)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.read().splitlines(keepends=True)
    child.wait()
    written = [int(line) for line in said if line.endswith("\n")]
    store = Store(tmp_path / "s.db")
    records = list(store.records())
    assert len(written) >= 60 and len(records) - len(written) in (0, 1)
    assert {str(n) for n in written} <= {r.request for r in records}
    for found in records:
        assert found.pictures == {found.response: found.request.encode() * 2000}
    assert store.check() == []
