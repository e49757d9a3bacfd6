"""10,000 calls, 64 at a time, three of ten answers a fault; killed in the middle and continued."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import storm

from mmsr_jax.tools.store import Store

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def start():
    """Starts storm.py with these words; ends what still runs."""
    children = []

    def run(*words):
        places = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "SERPER_API_KEY": "sk-storm-secret", "PYTHONPATH": os.pathsep.join(places),
        }  # fmt: skip
        command = [sys.executable, str(HERE / "storm.py"), *map(str, words)]
        children.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.wait()


def stats(url):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url + "/stats") as answer:
        return json.load(answer)


def ended(log):
    """(number, query, kind, error, seconds) of every call that ended, of whole lines only."""
    lines = log.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def check_against_truth(path):
    """Every record says what the server says, and nothing else; -> texts by query."""
    store = Store(path)
    assert store.check() == []
    known = {}
    for record in store.records():
        request, response = json.loads(record.request), json.loads(record.response)
        if record.kind == "links":
            expected = [o["snippet"] for o in storm.truth(request["query"])["organic"]]
            assert [hit["text"] for hit in response["hits"]] == expected
            known[request["query"]] = expected
        assert record.complete
    summary = store.summary()
    store.close()
    for file in path.parent.iterdir():
        assert b"sk-storm-secret" not in file.read_bytes()
    return known, summary


def check_causes(faults, tries, lines):
    """Every named ending comes from a fault of its name, and every fault is heard of.

    A hang is the one fault that costs a call its time. Who joined a call that ran out of it asks
    once more with the little that is left, and may be late for an answer of any kind: that is a
    timeout for a try that met no hang.
    """
    missing = {}
    print(f"{'ending':13} {'injected':>8} {'tries':>6} {'calls':>6}  faults")
    late = {query for _, query, kind, *_ in lines if kind == "timeout"}
    for ending in dict.fromkeys(storm.FAULTS.values()):
        names = [name for name, ends in storm.FAULTS.items() if ends == ending]
        met = [query for name in names for query in faults[name]]
        calls = [(query, error) for _, query, kind, error, _ in lines if kind == ending]
        print(f"{ending:13} {len(met):8} {tries.get(ending, 0):6} {len(calls):6}  {names}")
        # Another query's 429 holds all calls, also one that has no time for it.
        heard = {query for query, error in calls if "the next request may go in" not in error}
        assert heard <= set(met), f"{ending} without such a fault: {heard - set(met)}"
        if not set(names) & set(storm.MENDED):
            assert set(met) - heard <= late, f"nobody heard of {names}: {set(met) - heard - late}"
        if ending != "bad_response":  # of that the HTTP client knows nothing: it was a whole 200
            missing[ending] = len(met) - tries.get(ending, 0)
    beyond = -missing.pop("timeout")
    # A call that has no time for the hold is a failed try that never went out.
    assert missing.pop("rate_limited") <= beyond
    assert all(count >= 0 for count in missing.values()) and sum(missing.values()) <= beyond
    print(f"timeouts of tries that met no hang: {beyond}")


@pytest.mark.slow
def test_every_call_ends_with_a_result_or_a_name(start, tmp_path):
    server = start("server", 1)
    url = server.stdout.readline().strip()
    log = tmp_path / "log"
    client = start("client", url, tmp_path / "s.db", log, 10_000, 4_000)
    told = json.loads(client.stdout.read())
    assert client.wait() == 0
    served = stats(url)
    print(json.dumps(told))
    print(f"good answers: {sum(served['good'].values())}")
    lines = ended(log)
    assert sorted(number for number, *_ in lines) == list(range(10_000))  # none lost or doubled
    assert sum(told["outcomes"].values()) == 10_000 and told["wrong"] == []
    assert set(told["outcomes"]) <= {"items", "no_results", *storm.FAULTS.values()}
    assert set(served["faults"]) == set(storm.FAULTS)
    assert sum(map(len, served["faults"].values())) > 500
    check_causes(served["faults"], told["tries"], lines)
    assert all(kind == "timeout" for *_, kind, _, took in lines if took >= storm.DEADLINE)
    # One good answer to a query is enough for all of its calls, unless it came too late for the
    # one who asked.
    late = collections.Counter(query for _, query, kind, *_ in lines if kind == "timeout")
    assert all(times <= 1 + late[query] for query, times in served["good"].items())
    assert told["longest"] < storm.DEADLINE + 5
    assert told["memory_mb"][-1] - told["memory_mb"][2] < 25
    known, summary = check_against_truth(tmp_path / "s.db")
    assert set(known) <= set(served["good"])
    assert set(served["good"]) - set(known) <= set(late)  # nothing that came in time is missing
    answered = {query for _, query, kind, *_ in lines if kind in ("items", "no_results")}
    assert answered <= set(known)
    print({k: summary[k] for k in ("records", "hits", "misses", "paid", "file_bytes")})


@pytest.mark.slow
def test_killed_in_the_storm_and_continued(start, tmp_path):
    server = start("server", 2)
    url = server.stdout.readline().strip()
    path, log = tmp_path / "s.db", tmp_path / "log"
    client = start("client", url, path, log, 10_000, 4_000)
    until = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 2_500:
        assert client.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    client.send_signal(signal.SIGKILL)
    client.wait()
    lines = ended(log)
    first = {query for _, query, kind, *_ in lines if kind in ("items", "no_results")}
    before = collections.Counter(stats(url)["good"])
    known, _ = check_against_truth(path)
    assert first <= set(known)  # what was answered had been recorded
    print(f"killed after {len(lines)} calls: {len(first)} queries answered, {len(known)} recorded")
    told = json.loads(start("client", url, path, tmp_path / "log2", 10_000, 4_000).stdout.read())
    print(json.dumps(told))
    assert told["wrong"] == [] and sum(told["outcomes"].values()) == 10_000
    after = collections.Counter(stats(url)["good"])
    # What was in the store was never asked for again; lost were only answers on their way when the
    # kill came, and those that came too late for the one who asked.
    assert all(after[query] == before[query] for query in known)
    ends = lines + ended(tmp_path / "log2")
    late = collections.Counter(query for _, query, kind, *_ in ends if kind == "timeout")
    assert sum(max(0, n - 1 - late[query]) for query, n in after.items()) <= storm.AT_ONCE
    check_against_truth(path)
