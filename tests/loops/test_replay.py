"""A run on recorded searches is the run that recorded them, to the token; it asks and pays once."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
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

TOOLS = pathlib.Path(__file__).parents[1] / "tools"
STEPS, PROMPTS, GROUP = 8, 4, 8  # 8 known and 8 unknown questions, 2 of each a step: two epochs
UNEQUAL = ("time/", "compile/", "engine/", "tools/")


@contextlib.contextmanager
def serving():
    """The flags world's engine in a process of its own; yields (address, how to end it)."""
    places = [str(TOOLS), str(TOOLS.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(TOOLS / "flags_server.py")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()


def asked(url):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url + "/stats") as answer:
        return json.load(answer)


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
    counts: dict  # calls at the server, by request


@pytest.fixture(scope="module")
def recorded(small, tmp_path_factory) -> Recorded:
    """A run against the live server, which is gone afterwards."""
    folder = tmp_path_factory.mktemp("recorded")
    with serving() as url:
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
    print(f"{len(recorded.counts)} distinct requests came to the server, the warm-up's included")
    assert len(recorded.counts) > 20 and set(recorded.counts.values()) == {1}
    last = metrics(recorded.workdir)[-1]
    print({k: v for k, v in last.items() if k.startswith("tools/")})
    assert last["tools/paid"] == last["tools/paid_calls"] == len(recorded.counts)
    assert last["tools/live"] == len(recorded.counts)
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
    given = experiment(small, recorded.url, recorded.store, "replay")
    replayed = play(given, tmp_path / "replay")
    results = [t.result for e in replayed for t in e.turns if t.result is not None]
    tokens = sum(len(t.tokens) for t in replayed)
    print(f"{len(replayed)} trajectories of {tokens} tokens, {len(results)} searches")
    assert {r.tool for r in results} == {"image_search", "text_search"}
    assert len(replayed) == len(recorded.trajectories) == STEPS * PROMPTS * GROUP
    for one, other in zip(recorded.trajectories, replayed, strict=True):
        assert (one.example.id, one.sample) == (other.example.id, other.sample)
        np.testing.assert_array_equal(one.tokens.ids, other.tokens.ids)
        np.testing.assert_array_equal(one.tokens.authors, other.tokens.authors)
        np.testing.assert_array_equal(one.tokens.logprobs, other.tokens.logprobs)
        assert one.ending == other.ending and one.responses == other.responses
    assert comparable(tmp_path / "replay") == comparable(recorded.workdir)
    last = metrics(tmp_path / "replay")[-1]
    assert all(last[f"tools/{name}"] == 0 for name in ("live", "failed", "paid", "missed"))
    store = Store(recorded.store)
    assert store.check() == []
    store.close()


@pytest.mark.slow
def test_the_end_of_the_money_saves_the_state_and_more_money_continues(recorded, small, tmp_path):
    paid = [line["tools/paid"] for line in metrics(recorded.workdir)]
    enough_for = next(n for n in range(1, STEPS) if paid[n] > paid[n - 1] and n % 2)
    money, workdir = paid[enough_for - 1], tmp_path / "run"
    with serving() as url:
        given = experiment(small, url, tmp_path / "store.db", money=money)
        with pytest.raises(BudgetSpent, match=f"budget of {money:g} US dollars.*is saved"):
            play(given, workdir)
        assert [line["step"] for line in metrics(workdir)] == list(range(1, enough_for + 1))
        assert (workdir / "checkpoints" / "grpo" / str(enough_for)).is_dir()
        more = dataclasses.replace(
            given, tools=dataclasses.replace(given.tools, budget=BudgetConfig(1000.0))
        )
        play(more, workdir)
        assert set(asked(url).values()) == {1}
    assert comparable(workdir) == comparable(recorded.workdir)
    payments = (workdir / "payments.jsonl").read_text().split()
    assert metrics(workdir)[-1]["tools/paid"] == paid[-1] == sum('"cost":' in x for x in payments)
