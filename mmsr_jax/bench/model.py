"""`mmsr bench model`: forward, forward + backward and cached decoding, beside the original.

Both sides have the same weights, inputs, machine and threads and run by turns. Their numbers are
compared before their times: the speed of a wrong model is worth nothing.
"""

import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import pathlib
import platform
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.bench.measure import Limits, Times, interleave, limits
from mmsr_jax.bench.ours import Ours
from mmsr_jax.bench.peer import Peer, threads
from mmsr_jax.bench.workload import (
    ROWS,
    SIZES,
    Workload,
    decode_bytes,
    forward_flops,
    parameters,
    workload,
)
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.weights import hf

PARTS = ("forward", "backward", "decode")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    size: str = "m100"  # one of SIZES, or a folder with a checkpoint
    dtype: str = ""  # of weights and computation; "" is float32 on CPU, else bfloat16
    inputs: tuple[str, ...] = ("small", "med")  # rows of workload.ROWS
    parts: tuple[str, ...] = PARTS
    rows: tuple[int, ...] = (1, 4)  # of decoding
    tokens: int = 32  # decoded in one run
    runs: int = 10
    peer: str = "torch"  # or "none"
    layers: str = "apart"  # or "stacked", see qwen2_5_vl.unstack
    remat: bool = False  # recompute in the backward pass; torch does not
    attention: str = "auto"  # ModelConfig.attention

    def __post_init__(self):
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: float32 or bfloat16")
        for what, known in (("peer", ("torch", "none")), ("layers", ("apart", "stacked"))):
            if getattr(self, what) not in known:
                raise ValueError(f"{what} {getattr(self, what)!r} is none of {', '.join(known)}")
        for what, chosen, known in (("input", self.inputs, ROWS), ("part", self.parts, PARTS)):
            for name in chosen:
                if name not in known:
                    raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")
        if min(self.tokens, self.runs, *self.rows) < 1:
            raise ValueError(
                f"tokens {self.tokens}, runs {self.runs} and rows {self.rows} must be at least 1"
            )


def run(options: Options) -> dict:
    """Measures, and returns the record that `--json` prints.

    Raises:
        ValueError: no such size, or no peer where one was asked for.
        RuntimeError: ours and the peer do not compute the same.
    """
    device = jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    with sides(options, dtype) as (ours, peer):
        best = limits(dtype)
        cases = []
        for name in options.inputs:
            work = workload(name, ours.config)
            for part in PARTS:
                if part in options.parts:
                    cases += getattr(_Cases(ours, peer, best, options), part)(work)
    return {
        "bench": "model",
        "date": datetime.date.today().isoformat(),
        "size": options.size,
        "parameters": parameters(ours.params),
        "dtype": dtype,
        "device": device_name(device),
        "threads": threads(),
        "versions": versions(),
        "peer": None if peer is None else f"transformers on torch, {peer.device}, sdpa",
        "layers": options.layers,
        "remat": options.remat,
        "matrix_flops_per_s": best.flops,
        "memory_bytes_per_s": best.bandwidth,
        "cases": cases,
    }


@contextlib.contextmanager
def sides(options: Options, dtype: str) -> Iterator[tuple[Ours, Peer | None]]:
    """Both, on the same weights; random ones go to the peer through a folder."""
    kinds = {name: getattr(options, name) for name in ("remat", "attention")}
    kinds |= {"dtype": dtype, "param_dtype": dtype}
    with contextlib.ExitStack() as stack:
        if options.size in SIZES:
            config = dataclasses.replace(SIZES[options.size], **kinds)
            params = _perturbed(qwen.init(config, jax.random.key(0)), jax.random.key(1))
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if options.peer != "none":
                hf.save(params, config, folder, dtype=dtype)
        elif pathlib.Path(options.size).is_dir():
            folder = pathlib.Path(options.size)
            loaded = hf.load(folder, dtype=dtype)
            config, params = dataclasses.replace(loaded.config, **kinds), loaded.params
        else:
            raise ValueError(f"{options.size!r} is neither a folder nor one of {', '.join(SIZES)}")
        peer = None if options.peer == "none" else Peer(folder, dtype, jax.default_backend())
        if options.layers == "apart":
            params = qwen.unstack(params)
        yield Ours(config, params), peer


@functools.partial(jax.jit, donate_argnums=0)
def _perturbed(params, key):
    """Norms and biases moved away from 1 and 0, so that one left out would show."""

    def moved(path, leaf):
        if path[-1].key not in ("scale", "bias"):
            return leaf
        noise = jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape, jnp.float32)
        return leaf + 0.1 * noise.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(moved, params)


@dataclasses.dataclass(frozen=True)
class _Cases:
    """Agreement first, then times, then what they mean."""

    ours: Ours
    peer: Peer | None
    best: Limits
    options: Options

    def forward(self, work: Workload) -> list[dict]:
        call, seconds = self.ours.forward(work)
        agreement = {}
        if self.peer is not None:
            mine, theirs = np.asarray(call()[0], np.float32), self.peer.logits(work)
            agreement = self._agree(f"logits of {work.name}", mine, theirs)
        theirs = None if self.peer is None else self.peer.forward(work)
        times = self._time(call, theirs)
        flops = forward_flops(self.ours.config, work)
        return [self._case(work, "forward", seconds, times, agreement) | self._flops(flops, times)]

    def backward(self, work: Workload) -> list[dict]:
        call, seconds = self.ours.backward(work)
        agreement, theirs = {}, None
        if self.peer is not None:
            theirs = self.peer.backward(work)
            loss, gradients = call()
            squares = [
                jnp.vdot(g, g, preferred_element_type="f") for g in jax.tree.leaves(gradients)
            ]
            del gradients
            mine = np.asarray([loss, sum(squares) ** 0.5], np.float32)
            # Left to right: the backward pass comes before the norm of what it leaves.
            original = np.asarray([theirs(), self.peer.gradient_norm()], np.float32)
            agreement = self._agree(f"loss and gradient norm of {work.name}", mine, original)
        times = self._time(call, theirs)
        flops = 3 * forward_flops(self.ours.config, work)
        case = self._case(work, "forward + backward", seconds, times, agreement)
        gc.collect()
        return [case | self._flops(flops, times)]

    def decode(self, work: Workload) -> list[dict]:
        cases, tokens = [], self.options.tokens
        for rows in self.options.rows:
            call, seconds = self.ours.decode(work, rows, tokens)
            agreement, theirs = {}, None
            if self.peer is not None:
                theirs = self.peer.decode(work, rows, tokens)
                agreement = self._same_tokens(work, call(), theirs())
            times = self._time(call, theirs)
            context = work.ids.shape[1] + (tokens + 1) / 2  # on the average of the run
            least = decode_bytes(self.ours.config, rows, context)
            rate = least * tokens / times["ours"].best
            cases.append(
                self._case(work, f"decode, {rows} rows", seconds, times, agreement, per=tokens)
                | {
                    "tokens_per_s": rows * tokens / times["ours"].best,
                    "bytes_per_step": least,
                    "bytes_per_s": rate,
                    "floor_ms": 1e3 * least / self.best.bandwidth,
                    "of_floor": rate / self.best.bandwidth,
                }
            )
        return cases

    def _time(self, ours, theirs) -> dict[str, Times]:
        functions = {"ours": ours} if theirs is None else {"ours": ours, "peer": theirs}
        return interleave(functions, self.options.runs)

    def _case(self, work, what, seconds, times, agreement, per: int = 1) -> dict:
        if what.startswith("decode"):
            attention = {"cache": self.ours.cached_attention()}
        else:
            attention = self.ours.attention(work)
        case = {
            "what": what,
            "input": work.name,
            "tokens": work.ids.shape[1],
            "patches": len(work.patches),
            "attention": attention,
            "compile_s": seconds,
            "ours": times["ours"].record(per),
            **agreement,
        }
        if "peer" in times:
            case["peer"] = times["peer"].record(per)
            case["ratio"] = times["peer"].best / times["ours"].best
            case["ratio_of_medians"] = times["peer"].median / times["ours"].median
        return case

    def _flops(self, flops: float, times: dict[str, Times]) -> dict:
        rate = flops / times["ours"].best
        return {
            "flops": flops,
            "flops_per_s": rate,
            "floor_ms": 1e3 * flops / self.best.flops,
            "of_floor": rate / self.best.flops,
        }

    def _agree(self, what: str, mine: np.ndarray, theirs: np.ndarray) -> dict:
        """float32: every number, relative to the largest; bfloat16: on the average."""
        difference = np.abs(mine - theirs)
        if self.ours.config.dtype == "float32":
            off, most = difference.max() / np.abs(theirs).max(), 1e-4
        else:
            off, most = difference.mean() / np.abs(theirs).mean(), 5e-2
        if not off <= most:
            raise RuntimeError(
                f"ours and the peer differ in the {what} by {off:.1e} relative, {most:.0e} allowed"
            )
        return {"max_difference": float(difference.max()), "relative_difference": float(off)}

    def _same_tokens(self, work: Workload, mine: np.ndarray, theirs: np.ndarray) -> dict:
        """Greedy choices; once rounding tips one of them, those after it are free to differ."""
        equal = float(np.mean(mine == theirs))
        if self.ours.config.dtype == "float32" and equal < 0.5:
            raise RuntimeError(
                f"ours and the peer decode the same {equal:.0%} of tokens after {work.name}"
            )
        return {"equal_tokens": equal}


def device_name(device: jax.Device) -> str:
    """Its name; of a CPU the model that the system tells."""
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
