"""A run on recorded searches is the run that recorded them, to the token; it asks and pays once."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

from mmsr_jax.experiment import Experiment
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import grpo
from mmsr_jax.loops import run as loop
from mmsr_jax.tools.assembly import WebConfig
from mmsr_jax.tools.budget import BudgetConfig, BudgetSpent
from mmsr_jax.tools.costs import estimate, measure, table
from mmsr_jax.tools.providers.retriever import RetrieverConfig
from mmsr_jax.tools.store import Store, StoreConfig

ENVIRONMENT = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
MMSR = (sys.executable, "-m", "mmsr_jax.cli.main")
STEPS, PROMPTS, GROUP = 8, 4, 8  # 8 known and 8 unknown questions, 2 of each a step: two epochs
UNEQUAL = ("time/", "compile/", "engine/", "tools/")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pathlib.Path:
    """The flags world's pages and pictures, written out and indexed as a user would."""
    folder = tmp_path_factory.mktemp("index")
    for words in (
        ("data", "corpus", "flags", "corpus"),
        ("search", "index", "corpus", "index", "--thumbnail", "56"),
    ):
        subprocess.run([*MMSR, *words], cwd=folder, env=ENVIRONMENT, check=True)
    return folder / "index"


@contextlib.contextmanager
def serving(index):
    """`mmsr search serve` in a process of its own; yields its address, and kills it."""
    command = [*MMSR, "search", "serve", str(index), "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        line = child.stdout.readline()
        assert line.startswith(f"serving {index} on http://127.0.0.1:"), line
        yield line.split()[-1]
    finally:
        child.kill()
        child.wait()


def asked(url) -> dict[str, int]:
    """Searches that the server has answered, all of them well, by kind of the store's records."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url + "/metrics", timeout=30) as answer:
        page = answer.read().decode()
    pattern = r'^mmsr_search_requests_total\{path="(\S+)",status="(\d+)"\} (\d+)$'
    found = re.findall(pattern, page, re.M)
    assert {status for _, status, _ in found} == {"200"}
    counts = {path: int(count) for path, _, count in found}
    return {"lens": counts["/image"], "links": counts["/retrieve"]}


def kept(path) -> dict[str, int]:
    """Distinct requests that a store holds, of the kinds that go to a server."""
    store = Store(path, write=False)
    kinds = {k["kind"]: k["records"] for k in store.summary()["kinds"]}
    store.close()
    return {kind: kinds[kind] for kind in ("lens", "links")}


def experiment(small, url, store, mode="cache", money=0.0) -> Experiment:
    """GRPO on questions that a longer warm-up has taught to search for; a call costs a dollar."""
    replace = dataclasses.replace
    retriever = RetrieverConfig(url=url, index="flags", price=1.0)
    return replace(
        small,
        stages=("sft", "grpo"),
        tools=replace(
            small.tools,
            backend="web",
            web=WebConfig(text="retriever", image="retriever", retriever=retriever),
            store=StoreConfig(path=str(store), mode=mode),
            budget=BudgetConfig(money),
        ),
        sft=replace(small.sft, steps=400),
        grpo=replace(small.grpo, steps=STEPS, prompts=PROMPTS, group_size=GROUP),
    )


def play(given, workdir):
    """Runs it; -> all trajectories of GRPO, in order."""
    seen, sample = [], grpo._Sampler.sample

    def watched(sampler, number):
        groups, measured = sample(sampler, number)
        seen.extend(t for group in groups for t in group)
        return groups, measured

    with pytest.MonkeyPatch.context() as patch, RunLog(workdir) as log:
        patch.setattr(grpo._Sampler, "sample", watched)
        loop.run(given, workdir, log)
    return seen


def metrics(workdir) -> list[dict]:
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "grpo"]


def told(workdir) -> list[dict]:
    """What a run has written down of its trajectories (rewards and their parts too), untimed."""

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if not k.endswith("seconds")}
        return [untimed(v) for v in value] if isinstance(value, list) else value

    files = [workdir / "trajectories" / f"{step}.jsonl" for step in range(1, STEPS + 1)]
    return [untimed(json.loads(x)) for file in files for x in file.read_text().splitlines()]


def comparable(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith(UNEQUAL)} for line in metrics(workdir)
    ]


@dataclasses.dataclass
class Recorded:
    workdir: pathlib.Path
    store: pathlib.Path
    url: str
    trajectories: list
    counts: dict  # searches at the server, by kind


@pytest.fixture(scope="module")
def recorded(small, index, tmp_path_factory) -> Recorded:
    """A run against the live server, which is gone afterwards."""
    folder = tmp_path_factory.mktemp("recorded")
    with serving(index) as url:
        seen = play(experiment(small, url, folder / "store.db"), folder / "run")
        return Recorded(folder / "run", folder / "store.db", url, seen, asked(url))


def searches(trajectories, tool):
    return [
        (c.image if tool == "image_search" else (c.query, c.question))
        for t in trajectories
        for turn in t.turns
        if (c := turn.call) is not None and c.tool == tool and turn.author.name == "MODEL"
    ]


@pytest.mark.slow
def test_eight_samples_and_a_second_epoch_ask_once(recorded):
    epochs = [recorded.trajectories[: STEPS // 2 * PROMPTS * GROUP],
              recorded.trajectories[STEPS // 2 * PROMPTS * GROUP :]]  # fmt: skip
    visits = collections.Counter(t.example.id for t in recorded.trajectories)
    assert set(visits.values()) == {2 * GROUP}  # two epochs, all of them
    for tool in ("image_search", "text_search"):
        calls = [searches(epoch, tool) for epoch in epochs]
        distinct = len(set(calls[0]) | set(calls[1]))
        print(f"{tool}: {len(calls[0])} + {len(calls[1])} calls, {distinct} distinct")
        assert distinct < len(calls[0]) + len(calls[1])
    count = sum(recorded.counts.values())
    print(f"{count} requests came to the server, the warm-up's included: {recorded.counts}")
    assert recorded.counts == kept(recorded.store) and min(recorded.counts.values()) > 10
    last = metrics(recorded.workdir)[-1]
    print({k: v for k, v in last.items() if k.startswith("tools/")})
    assert last["tools/paid"] == last["tools/paid_calls"] == last["tools/live"] == count
    kinds = [
        measure(name, price, [searches(epoch, tool) for epoch in epochs], STEPS // 2 * PROMPTS,
                GROUP)
        for name, tool, price in (("Google Lens (Serper)", "image_search", 0.003),
                                  ("Google (Serper)", "text_search", 0.001))
    ]  # fmt: skip
    rows = estimate(kinds)
    print("\n" + table(rows))
    assert rows[-1].money_stored < rows[-1].money


@pytest.mark.slow
def test_replayed_with_the_server_down_to_the_token(recorded, small, tmp_path):
    with pytest.raises(urllib.error.URLError, match="refused"):
        asked(recorded.url)
    given = experiment(small, recorded.url, recorded.store, "replay")
    replayed = play(given, tmp_path / "replay")
    results = [t.result for e in replayed for t in e.turns if t.result is not None]
    tokens = sum(len(t.tokens) for t in replayed)
    tools = [{t.result.tool for t in e.turns if t.result is not None} for e in replayed]
    both = sum(len(used) == 2 for used in tools)
    print(
        f"{len(replayed)} trajectories of {tokens} tokens, {len(results)} searches, {both} by both"
    )
    assert both > 0
    assert {r.tool for r in results} == {"image_search", "text_search"}
    assert len(replayed) == len(recorded.trajectories) == STEPS * PROMPTS * GROUP
    for one, other in zip(recorded.trajectories, replayed, strict=True):
        assert (one.example.id, one.sample) == (other.example.id, other.sample)
        np.testing.assert_array_equal(one.tokens.ids, other.tokens.ids)
        np.testing.assert_array_equal(one.tokens.authors, other.tokens.authors)
        np.testing.assert_array_equal(one.tokens.logprobs, other.tokens.logprobs)
        for seen, again in zip(one.tokens.pictures, other.tokens.pictures, strict=True):
            np.testing.assert_array_equal(seen.patches, again.patches)
        assert one.ending == other.ending and one.responses == other.responses
    assert comparable(tmp_path / "replay") == comparable(recorded.workdir)
    assert told(tmp_path / "replay") == told(recorded.workdir) != []
    last = metrics(tmp_path / "replay")[-1]
    assert all(last[f"tools/{name}"] == 0 for name in ("live", "failed", "paid", "missed"))
    store = Store(recorded.store)
    assert store.check() == []
    store.close()


@pytest.mark.slow
def test_the_end_of_the_money_saves_the_state_and_more_money_continues(
    recorded, small, index, tmp_path
):
    paid = [line["tools/paid"] for line in metrics(recorded.workdir)]
    enough_for = next(n for n in range(1, STEPS) if paid[n] > paid[n - 1] and n % 2)
    money, workdir = paid[enough_for - 1], tmp_path / "run"
    with serving(index) as url:
        given = experiment(small, url, tmp_path / "store.db", money=money)
        with pytest.raises(BudgetSpent, match=f"budget of {money:g} US dollars.*is saved"):
            play(given, workdir)
        assert [line["step"] for line in metrics(workdir)] == list(range(1, enough_for + 1))
        assert (workdir / "checkpoints" / "grpo" / str(enough_for)).is_dir()
        more = dataclasses.replace(
            given, tools=dataclasses.replace(given.tools, budget=BudgetConfig(1000.0))
        )
        play(more, workdir)
        assert asked(url) == kept(tmp_path / "store.db")
    assert comparable(workdir) == comparable(recorded.workdir)
    payments = (workdir / "payments.jsonl").read_text().split()
    assert metrics(workdir)[-1]["tools/paid"] == paid[-1] == sum('"cost":' in x for x in payments)
