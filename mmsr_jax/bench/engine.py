"""`mmsr bench engine`: decoding, and a replay of multi-turn conversations with slow tools.

Decoding stands beside transformers' `generate` and the memory's bandwidth; the replay beside itself
with tools that answer at once, a scheduler of rounds behind a barrier, and a plain loop of
transformers that encodes the whole conversation in every round.
"""

import dataclasses
import datetime
import os

import jax

from mmsr_jax.bench import barrier, engine_decode, engine_peer, engine_replay, model, traces
from mmsr_jax.bench.engine_replay import Latency
from mmsr_jax.bench.peer import threads
from mmsr_jax.bench.workload import SIZES, parameters
from mmsr_jax.engine.engine import Engine
from mmsr_jax.model.config import ModelConfig

PARTS = ("decode", "replay", "barrier", "loop")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[str, ...] = PARTS
    sizes: tuple[str, ...] = ("tiny", "m100")  # of decoding
    dtype: str = ""  # of weights and computation; "" is float32 on CPU, else bfloat16
    rows: tuple[int, ...] = (1, 16)  # of decoding
    contexts: tuple[int, ...] = (64, 256)  # tokens before decoding begins
    tokens: int = 48  # decoded in one run
    runs: int = 5
    peer: str = "torch"  # or "none"
    replay_size: str = "tiny"
    replay_rows: int = 16
    flight: int = 64  # trajectories in the engine during a replay
    pages: int = 0  # of its pool; 0: enough for all in flight
    traces: str = ""  # file of traces; "": drawn
    groups: int = 96  # drawn prompts, with 8 samples each
    loop_groups: int = 32  # of them for the plain loop, which is slow
    seed: int = 0
    repeats: int = 3  # of a replay
    latency: Latency = Latency(scale=0.05)

    def __post_init__(self):
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(f"there is no part {name!r}; there are {', '.join(PARTS)}")
        for name in (*self.sizes, self.replay_size):
            if name not in SIZES:
                raise ValueError(f"there is no size {name!r}; there are {', '.join(SIZES)}")
        if self.peer not in ("torch", "none"):
            raise ValueError(f"peer {self.peer!r} is none of torch, none")
        if self.latency.recorded and not self.traces:
            raise ValueError("latencies as recorded need traces of a run: give --traces FILE")
        counts = {name: getattr(self, name) for name in COUNTS}
        if min(*counts.values(), *self.rows, *self.contexts) < 1:
            raise ValueError(
                f"{', '.join(f'{k} {v}' for k, v in counts.items())}, rows {self.rows} and "
                f"contexts {self.contexts} must be at least 1"
            )


COUNTS = ("tokens", "runs", "replay_rows", "flight", "groups", "loop_groups", "repeats")


def run(options: Options) -> dict:
    """Measures, and returns the record that `--json` prints.

    Raises:
        ValueError: no peer where one was asked for, or a file without traces.
        RuntimeError: ours and the peer do not choose the same tokens.
    """
    device = jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    record = {
        "bench": "engine",
        "date": datetime.date.today().isoformat(),
        "dtype": dtype,
        "device": model.device_name(device),
        "threads": threads(),
        "load_before": os.getloadavg()[0],
        "versions": model.versions(),
        "peer": None if options.peer == "none" else "transformers on torch, generate, sdpa",
    }
    if "decode" in options.parts:
        record["decode"] = [
            case for size in options.sizes for case in _decode(options, size, dtype)
        ]
    if set(options.parts) & set(PARTS[1:]):
        record["replay"] = _replays(options, dtype)
    return record | {"load_after": os.getloadavg()[0]}


def _sides(options: Options, size: str, dtype: str):
    """Both on the same weights; the engine takes its layers apart by itself."""
    return model.sides(model.Options(size=size, peer=options.peer, layers="stacked"), dtype)


def _decode(options: Options, size: str, dtype: str):
    with _sides(options, size, dtype) as (ours, peer):
        generate = None if peer is None else engine_peer.Generate(peer)
        for rows in options.rows:
            for context in options.contexts:
                case = engine_decode.Case(rows, context, options.tokens, options.runs)
                yield {
                    "size": size,
                    "parameters": parameters(ours.params),
                    **engine_decode.measure(ours.config, ours.params, generate, case),
                }


def _replays(options: Options, dtype: str) -> dict:
    with _sides(options, options.replay_size, dtype) as (ours, peer):
        config = ours.config
        if options.traces:
            played = traces.load(options.traces, config)
        else:
            played = traces.draw(options.groups, config, options.seed)
        late = options.latency.described(played)
        settings = engine_replay.sizes(played, options.replay_rows, options.flight, options.pages)
        engine = engine_replay.warm(config, ours.params, settings)
        record = {
            "size": options.replay_size,
            "traces": len(played),
            "prompts": len(traces.by_group(played)),
            "turns": sum(len(trace.turns) for trace in played),
            "tokens": sum(sum(trace.turns) for trace in played),
            "latency": late,
            "engine": dataclasses.asdict(settings),
        }
        if "replay" in options.parts or "barrier" in options.parts:
            record |= _schedulers(options, engine, played)
        if "loop" in options.parts and peer is not None:
            record["loop"] = _loop(options, config, engine, engine_peer.Generate(peer), played)
        return record


def _schedulers(options: Options, engine: Engine, played: list[traces.Trace]) -> dict:
    """Ours with slow tools and with instant ones, and behind a barrier, by turns."""
    slow, instant = options.latency, dataclasses.replace(options.latency, scale=0.0)
    sides = {
        "instant": lambda: engine_replay.replay(engine, played, instant),
        "slow": lambda: engine_replay.replay(engine, played, slow),
    }
    once = {}
    if "barrier" in options.parts:
        # Batches as large as the rows, and as large as what ours has in flight (its best case).
        for name, batch in (("barrier", options.replay_rows), ("barrier_large", options.flight)):
            once[name] = lambda batch=batch: barrier.replay(engine, played, slow, batch)
    found: dict[str, list[dict]] = {}
    for turn in range(options.repeats):
        for name, side in (sides | (once if not turn else {})).items():
            found.setdefault(name, []).append(side())
    record = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items()}
    record["seconds"] = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    rates = {name: run["tokens_per_s"] for name, run in record.items() if name in found}
    record["slow_by_instant"] = rates["slow"] / rates["instant"]
    steady = [record[name]["steady"]["tokens_per_s"] for name in ("slow", "instant")]
    record["slow_by_instant_steady"] = steady[0] / steady[1] if all(steady) else None
    for name in once:
        record[f"faster_than_{name}"] = record[name]["seconds"] / record["slow"]["seconds"]
    return record


def _loop(
    options: Options,
    config: ModelConfig,
    engine: Engine,
    generate: engine_peer.Generate,
    played: list[traces.Trace],
) -> dict:
    """The first prompts through ours and the plain loop, with slow tools and instant ones.

    By turns. The loop takes as many conversations at a time as ours has rows, and (instant only)
    one at a time.
    """
    some = [t for group in traces.by_group(played)[: options.loop_groups] for t in group]
    case = engine_decode.Case(options.replay_rows, len(some[0].prompt), 8, 1)
    way = generate.fastest(engine_decode.random_prompts(config, case))
    way = dataclasses.replace(way, cache="dynamic")  # lengths change in every round
    generate.use(way)
    slow, instant = options.latency, dataclasses.replace(options.latency, scale=0.0)
    rows = options.replay_rows
    sides = {
        "ours": lambda: engine_replay.replay(engine, some, instant),
        "peer": lambda: engine_peer.replay(generate, some, instant, rows),
        "ours_slow": lambda: engine_replay.replay(engine, some, slow),
        "peer_slow": lambda: engine_peer.replay(generate, some, slow, rows),
    }
    once = {"peer_single": lambda: engine_peer.replay(generate, some, instant, 1)}
    runs: dict[str, list[dict]] = {}
    for turn in range(options.repeats):
        for name, side in (sides | (once if not turn else {})).items():
            runs.setdefault(name, []).append(side())
    best = {name: min(found, key=lambda run: run["seconds"]) for name, found in runs.items()}
    seconds = {name: run["seconds"] for name, run in best.items()}
    return best | {
        "traces": len(some),
        "peer_way": dataclasses.asdict(way),
        "ratio": seconds["peer"] / seconds["ours"],
        "ratio_slow": seconds["peer_slow"] / seconds["ours_slow"],
        "ratio_single": seconds["peer_single"] / seconds["ours"],
        "seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
    }
