"""A run on recorded searches is the run that recorded them, to the token; and it asked once."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from mmsr_jax.logs import RunLog
from mmsr_jax.loops import grpo
from mmsr_jax.loops import run as loop
from mmsr_jax.tools.assembly import WebConfig
from mmsr_jax.tools.providers.retriever import RetrieverConfig
from mmsr_jax.tools.store import Store, StoreConfig

TOOLS = pathlib.Path(__file__).parents[1] / "tools"


@pytest.fixture
def server():
    places = [str(TOOLS), str(TOOLS.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(TOOLS / "flags_server.py")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    child.url = child.stdout.readline().strip()
    yield child
    child.kill()
    child.wait()


def asked(url):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url + "/stats") as answer:
        return json.load(answer)


def experiment(small, url, store, mode):
    """Two epochs of GRPO with groups of 8, after a warm-up that teaches the use of tools."""
    replace = dataclasses.replace
    retriever = RetrieverConfig(url=url, index="flags")
    web = WebConfig(text="retriever", image="retriever", retriever=retriever)
    return replace(
        small,
        stages=("sft", "grpo"),
        tools=replace(
            small.tools, backend="web", web=web, store=StoreConfig(path=str(store), mode=mode)
        ),
        sft=replace(small.sft, steps=400),
        # 8 known and 8 unknown questions, 2 of each in a step.
        grpo=replace(small.grpo, steps=8, prompts=4, group_size=8),
    )


def play(given, workdir, monkeypatch):
    """Runs it; -> all trajectories of GRPO, in order."""
    seen = []

    def watched(*args, **kwargs):
        groups, timings = rollout(*args, **kwargs)
        seen.extend(t for group in groups for t in group)
        return groups, timings

    rollout = grpo.rollout
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "rollout", watched)
        with RunLog(workdir) as log:
            loop.run(given, workdir, log)
    return seen


@pytest.mark.slow
def test_replayed_with_the_server_down_to_the_token(small, server, tmp_path, monkeypatch):
    store = tmp_path / "store.db"
    live = play(experiment(small, server.url, store, "cache"), tmp_path / "live", monkeypatch)
    counts = asked(server.url)
    calls = [t.call for e in live for t in e.turns if t.call is not None]
    results = [t.result for e in live for t in e.turns if t.result is not None]
    distinct = len({(c.tool, c.query, c.question if c.query else "", c.image) for c in calls})
    print(
        f"{len(live)} trajectories, {len(results)} searches, "
        f"{distinct} of them distinct; with the warm-up's, {len(counts)} distinct requests at the "
        f"server, {sum(counts.values())} calls to it"
    )
    assert len(results) > 30 and {r.tool for r in results} == {"image_search", "text_search"}
    assert set(counts.values()) == {1}  # G = 8 and a second epoch: each request once
    assert distinct < len(results)

    server.kill()
    server.wait()
    replayed = play(
        experiment(small, server.url, store, "replay"), tmp_path / "replay", monkeypatch
    )
    assert len(replayed) == len(live) == 8 * 4 * 8
    for one, other in zip(live, replayed, strict=True):
        assert (one.example.id, one.sample) == (other.example.id, other.sample)
        np.testing.assert_array_equal(one.tokens.ids, other.tokens.ids)
        np.testing.assert_array_equal(one.tokens.authors, other.tokens.authors)
        np.testing.assert_array_equal(one.tokens.logprobs, other.tokens.logprobs)
        assert one.ending == other.ending and one.responses == other.responses
    lines = [
        [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("live", "replay")
    ]
    last = [run[-1] for run in lines]
    print({k: v for k, v in last[0].items() if k.startswith("tools/")})
    print({k: v for k, v in last[1].items() if k.startswith("tools/")})
    assert last[1]["tools/live"] == 0 and last[1]["tools/failed"] == 0
    kept = Store(store)
    assert kept.check() == []
    kept.close()
