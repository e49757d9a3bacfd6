"""Decoding through the engine, and through transformers' `generate`: tokens a second.

Prompts are random ids, another for every row, all of one length. What is timed is decoding alone:
from the first token of every row (which the prompt's pass gives) to the last.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.bench.engine_peer import Generate
from mmsr_jax.bench.measure import PAUSE, Times
from mmsr_jax.bench.workload import decode_bytes
from mmsr_jax.engine.engine import Engine, EngineConfig
from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.inputs import chat
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.types import Tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """What is decoded."""

    rows: int
    context: int  # tokens of each prompt
    tokens: int  # decoded in each row
    runs: int


def measure(config: ModelConfig, params: dict, peer: Generate | None, case: Case) -> dict:
    """One row of the table; `params` with layers stacked.

    Raises:
        RuntimeError: ours and the peer do not choose the same tokens.
    """
    prompts = random_prompts(config, case)
    ours, memory = Ours(config, params, case), Memory(config.param_dtype)
    sides = {"ours": lambda: ours.run(prompts)}
    way = None
    if peer is not None:
        way = peer.fastest(prompts)
        sides["peer"] = lambda: peer.decode(prompts, case.tokens, way)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    chosen: dict[str, np.ndarray] = {}
    bandwidth = 0.0
    for turn in range(case.runs + 1):  # by turns; the first run of each is not counted
        bandwidth = max(bandwidth, memory.bandwidth())
        for name, run in sides.items():
            time.sleep(PAUSE)
            took, chosen[name] = run()
            if turn:
                seconds[name].append(took)
    times = {name: Times(tuple(taken)) for name, taken in seconds.items()}
    least = decode_bytes(config, case.rows, case.context + (case.tokens + 1) / 2)
    record = {
        "rows": case.rows,
        "context": case.context,
        "tokens": case.tokens,
        "ours": _rate(times["ours"], case),
        "memory_bytes_per_s": bandwidth,
        "bytes_per_step": least,
        "floor_tokens_per_s": case.rows * bandwidth / least,
        "of_floor": least * case.tokens / times["ours"].best / bandwidth,
    }
    if peer is None:
        return record
    equal = float(np.mean(chosen["ours"] == chosen["peer"]))
    # Of bfloat16 rounding tips a choice now and then, and those after it are free to differ.
    if config.dtype == "float32" and equal < 1:
        raise RuntimeError(
            f"ours and the peer choose the same {equal:.1%} of tokens at {case.rows} rows of "
            f"{case.context} tokens"
        )
    return record | {
        "peer": _rate(times["peer"], case),
        "peer_way": dataclasses.asdict(way),
        "equal_tokens": equal,
        "ratio": times["peer"].best / times["ours"].best,
        "ratio_of_medians": times["peer"].median / times["ours"].median,
    }


class Memory:
    """What reading memory costs: the better of a copy and a matrix-vector product."""

    def __init__(self, dtype: str, megabytes: int = 256):
        count = megabytes * 10**6 // jnp.dtype(dtype).itemsize
        self.table = jnp.ones((count // 4096, 4096), dtype)
        self.vector = jnp.ones((4096,), dtype)
        self.copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
        self.read = jax.jit(lambda table, vector: table @ vector)

    def bandwidth(self, seconds: float = 0.2) -> float:
        """Bytes a second, over a stretch as long as a decode: a burst of 4 ms on a machine that is
        shared says more than anything could keep up.
        """
        best, size = 0.0, self.table.nbytes
        for moved, run in (
            (2 * size, lambda: self.copy(self.table)),
            (size, lambda: self.read(self.table, self.vector)),
        ):
            done, began = 0, time.perf_counter()
            while not done or time.perf_counter() - began < seconds:
                jax.block_until_ready(run())
                done += moved
            best = max(best, done / (time.perf_counter() - began))
        return best


def random_prompts(config: ModelConfig, case: Case) -> np.ndarray:
    """[rows, context] int32, no special ids."""
    special = {getattr(config, f.name) for f in dataclasses.fields(config) if "token_id" in f.name}
    plain = np.setdiff1d(np.arange(config.text.vocab_size), list(special))
    return np.random.default_rng(0).choice(plain, (case.rows, case.context)).astype(np.int32)


class Ours:
    """An engine of as many rows as there are prompts."""

    def __init__(self, config: ModelConfig, params: dict, case: Case):
        slots = case.context + case.tokens + 1
        sizes = EngineConfig(
            rows=case.rows,
            slots=slots,
            pages=case.rows * (-(-slots // EngineConfig.page) + 1),
            turn_tokens=case.tokens,
            feature_rows=EngineConfig.patches,
        )
        self.tokens = case.tokens
        self.engine = Engine(qwen.abstract(config)[0], config, sizes, eos_ids=())
        self.engine.set_params(params)

    def run(self, prompts: np.ndarray) -> tuple[float, np.ndarray]:
        """Seconds of decoding, and the greedy tokens [rows, 1 + tokens]."""
        engine = self.engine
        numbers = [
            engine.submit(Request(as_prompt(ids), (stream(row),), budget=1))[0]
            for row, ids in enumerate(prompts)
        ]
        first = self._finish()
        for number in numbers:  # nothing to read: each goes on where it stands
            engine.resume(Resume(number, as_prompt(prompts[0, :0]), (), self.tokens))
        began = time.perf_counter()
        rest = self._finish()
        seconds = time.perf_counter() - began
        for number in numbers:
            engine.release(number)
        return seconds, np.stack([np.concatenate([first[n], rest[n]]) for n in numbers])

    def _finish(self) -> dict[int, np.ndarray]:
        said = {}
        while self.engine.busy:
            said |= {turn.number: turn.ids for turn in self.engine.step(0.0)}
        return said


def as_prompt(ids: np.ndarray) -> Tokens:
    """Ids of text as the beginning of a conversation."""
    return chat.model_turn(ids, np.zeros(ids.size, np.float32), 0)


def _rate(times: Times, case: Case) -> dict:
    return {
        "tokens_per_s": case.rows * case.tokens / times.best,
        "median_tokens_per_s": case.rows * case.tokens / times.median,
        **times.record(per=case.tokens),
    }
