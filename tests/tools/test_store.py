"""The store keeps what it was given, whole, for several processes, within its size."""

import hashlib
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from mmsr_jax.tools.store import Record, Store, StoreConfig


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
        Store(tmp_path / "nowhere.db", create=False)
    assert not (tmp_path / "nowhere.db").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ttl": -1}, "not -1"), ({"max_bytes": -5}, "not -5"), ({"mode": "replay"}, "no store")],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StoreConfig(**options)


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
