"""The original's way of sampling: transformers' `generate`, on the same weights."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from mmsr_jax.bench.engine_replay import Latency, call, tools
from mmsr_jax.bench.peer import Peer, threads
from mmsr_jax.bench.traces import Trace
from mmsr_jax.types import Picture


@dataclasses.dataclass(frozen=True)
class Way:
    """How `generate` runs."""

    cache: str  # "dynamic": grows, transformers' own choice; or "static"
    threads: int  # of torch; on a busy machine one may be faster than all


class Generate:
    """`generate` of the model of a `Peer`."""

    def __init__(self, peer: Peer):
        self.peer, self.torch, self.model = peer, peer.torch, peer.model

    def fastest(self, prompts: np.ndarray, tokens: int = 8, trials: int = 2) -> Way:
        """The way that decodes these prompts fastest here and now."""
        ways = [Way(cache, count) for cache in ("dynamic", "static") for count in {1, threads()}]
        taken = dict.fromkeys(ways, float("inf"))
        for _ in range(trials):
            for way in ways:
                taken[way] = min(taken[way], self.decode(prompts, tokens, way)[0])
        return min(taken, key=taken.get)

    def use(self, way: Way) -> None:
        """How many threads torch takes from now on."""
        if self.torch.get_num_threads() != way.threads:
            self.torch.set_num_threads(way.threads)

    def decode(self, prompts: np.ndarray, tokens: int, way: Way) -> tuple[float, np.ndarray]:
        """Seconds between the first token of all rows and the last, greedy tokens [rows, 1 + n].

        Args:
            prompts: [rows, T] int32 of text.
            tokens: after the first.
        """
        self.use(way)
        clock = []
        out = self._generate(
            self.torch.from_numpy(prompts).long(),
            max_new_tokens=tokens + 1,
            do_sample=False,
            cache_implementation=None if way.cache == "dynamic" else way.cache,
            stopping_criteria=[lambda ids, scores, **_: self._tick(clock, ids)],
        )
        return clock[-1] - clock[0], out[:, prompts.shape[1] :].astype(np.int32)

    def say(self, conversations: Sequence[tuple], count: int) -> None:
        """Encodes whole conversations, padded on the left, and samples `count` tokens after each.

        Args:
            conversations: (ids [T] int32, picture tokens [T] bool, pictures) each.
        """
        torch, longest = self.torch, max(len(ids) for ids, *_ in conversations)
        shape = (len(conversations), longest)
        ids, real, kinds = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        pictures: list[Picture] = []
        for row, (own, shown, seen) in enumerate(conversations):
            ids[row, longest - len(own) :] = torch.from_numpy(own).long()
            real[row, longest - len(own) :] = 1
            kinds[row, longest - len(own) :] = torch.from_numpy(shown).long()
            pictures += seen
        more = {}
        if pictures:
            patches = np.concatenate([picture.patches for picture in pictures])
            more["pixel_values"] = torch.from_numpy(patches)
            more["image_grid_thw"] = torch.tensor([picture.grid for picture in pictures])
        self._generate(
            ids, attention_mask=real, mm_token_type_ids=kinds, max_new_tokens=count,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **more,
        )  # fmt: skip

    def _tick(self, clock: list[float], ids):
        clock.append(time.perf_counter())
        return self.torch.zeros(ids.shape[0], dtype=self.torch.bool, device=ids.device)

    def _generate(self, ids, **settings) -> np.ndarray:
        torch, device = self.torch, self.peer.device
        self.model.model.rope_deltas = None  # the original keeps state between calls
        placed = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in ({"attention_mask": torch.ones_like(ids)} | settings).items()
        }
        with torch.inference_mode():
            out = self.model.generate(
                ids.to(device), eos_token_id=None, pad_token_id=0, use_cache=True, **placed
            )
        return out.cpu().numpy()


def replay(generate: Generate, traces: Sequence[Trace], latency: Latency, batch: int) -> dict:
    """A plain loop: `batch` conversations at a time, each encoded as a whole in every round.

    A round samples as many tokens as the longest turn in it; what is too much of the others is cut.
    Then all tools are awaited. Words that were recorded go on, as in every replay.

    Returns: seconds, and the tokens that were asked for (what was too much does not count).
    """
    began, idle = time.perf_counter(), 0.0
    with tools(latency, batch) as toolbox:
        for at in range(0, len(traces), batch):
            live, turn = list(traces[at : at + batch]), 0
            while live:
                said = [_so_far(trace, 2 * turn + 1) for trace in live]
                generate.say(said, max(trace.turns[turn] for trace in live))
                turn += 1
                live = [trace for trace in live if len(trace.turns) > turn]
                start = time.perf_counter()
                concurrent.futures.wait(
                    [toolbox.submit(call(latency, trace, turn - 1)) for trace in live]
                )
                idle += time.perf_counter() - start
    seconds = time.perf_counter() - began
    tokens = sum(sum(trace.turns) for trace in traces)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "no_work_share": idle / seconds,
        "batch": batch,
    }


def _so_far(trace: Trace, pieces: int):
    """A conversation as `Generate.say` takes it."""
    known = trace.pieces[:pieces]
    ids = np.concatenate([piece.ids for piece in known])
    shown = np.concatenate([piece.image_index >= 0 for piece in known])
    return ids, shown, trace.pictures(pieces)
