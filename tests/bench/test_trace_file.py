"""Recorded traces: a run's conversations come back with their sizes, places and seconds."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from mmsr_jax.agent.rollout import Ask, rollout
from mmsr_jax.bench import barrier, engine, engine_replay, trace_file, traces
from mmsr_jax.bench.engine_replay import Latency
from mmsr_jax.cli.main import main
from mmsr_jax.engine.engine import Engine
from mmsr_jax.logs import RunLog
from mmsr_jax.report.trace import trace_records
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Author, ResultItem

SEARCH = "<reason>Look.</reason><search><img></search>"
FORCED = {"a": SEARCH, "b": "<reason>Name.</reason><text_search>Paris</text_search>", "c": ""}


class Slow:
    """One picture and one line, or nothing, after a while; the while is known to the test."""

    def __init__(self, name, picture, seconds):
        self.name, self.picture, self.seconds = name, picture, seconds

    async def run(self, call):
        await asyncio.sleep(self.seconds)
        if call.tool == "text_search":
            raise ToolError("no_results")
        return (ResultItem("Lisbon", thumbnail=self.picture), ResultItem("Porto"))


class Scripted(Engine):
    """The real engine; the first turn of a question ends where its forced beginning ended."""

    def step(self, temperature):
        turns = super().step(temperature)
        return [
            dataclasses.replace(turn, ids=turn.ids[:1], logprobs=turn.logprobs[:1],
                                versions=turn.versions[:1], stopped=True)
            for turn in turns
        ]  # fmt: skip


@pytest.fixture(scope="module")
def groups(tiny):
    """Real rollouts of three questions: one turn, or a tool's result and a second one."""
    machine = Scripted(tiny.graph, tiny.model, tiny.engine_config, (tiny.tokenizer.im_end,))
    machine.set_params(tiny.params())
    thumbnail = tiny.example("thumbnail").image
    tools = {
        "image_search": Slow("image_search", thumbnail, 0.05),
        "text_search": Slow("text_search", thumbnail, 0.02),
    }
    asks = [Ask(tiny.example(name), 3, forced=forced) for name, forced in FORCED.items()]
    with Toolbox(tools, deadline=5.0) as toolbox:
        found, _ = rollout(machine, toolbox, asks, tiny.setting, seed=3, temperature=1.0)
    return found
