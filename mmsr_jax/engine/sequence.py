"""The host's record of one trajectory in the engine.

Its tokens are kept whole, so that what is in the pool of pages can be thrown away at any time and
computed again. One invariant makes the rest simple: the last known token is never in the pool; it
is what a decoding step feeds next. So a trajectory is ready to decode when `cached == known - 1`,
and has to be fed otherwise, whatever the reason (new, extended, dropped, new weights).
"""

import dataclasses
import enum

import numpy as np

from mmsr_jax.types import Picture, Tokens


class Status(enum.Enum):
    """Where a trajectory stands."""

    FEEDING = "feeding"  # tokens have to go into the pool before it can decode
    READY = "ready"  # all but the last are there; waits for a row
    RUNNING = "running"  # has a row
    PAUSED = "paused"  # has ended a turn; the caller will extend it or release it


@dataclasses.dataclass
class Sequence:
    """One trajectory. `n` tokens are known, room for `capacity`."""

    number: int  # in order of submission; the lower, the more senior
    key: np.ndarray  # [2] uint32, its random stream
    group: tuple[int, ...]  # numbers of all samples of its prompt, its own included
    prompt: int  # tokens of the prompt
    ids: np.ndarray  # [capacity] int32
    positions: np.ndarray  # [3, capacity] int32
    feature: np.ndarray  # [capacity] int32, row among all features of its pictures, -1 for text
    left: int  # tokens that it may still sample in this turn
    known: int = 0
    cached: int = 0  # tokens whose keys and values are in `pages`
    pages: list[int] = dataclasses.field(default_factory=list)
    pictures: tuple[Picture, ...] = ()
    status: Status = Status.FEEDING
    since: int = 0  # tick of the engine at which the status began
    sampled: int = 0  # tokens sampled in all turns: the number of the next draw
    fed: int = 0  # times that what is in the pool has changed, but for what was sampled
    seen: int = 0  # most tokens that were ever in the pool: feeding below that is done twice
    turn_ids: list[int] = dataclasses.field(default_factory=list)
    turn_logprobs: list[float] = dataclasses.field(default_factory=list)
    turn_versions: list[int] = dataclasses.field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens to be fed before it can decode."""
        return self.known - 1 - self.cached

    def append(self, tokens: Tokens, pictures: tuple[Picture, ...]) -> None:
        """Takes in a piece of the conversation. `pictures` are all of them so far."""
        end = self.known + len(tokens)
        self.ids[self.known : end] = tokens.ids
        self.positions[:, self.known : end] = tokens.positions
        self.feature[self.known : end] = tokens.image_index
        self.known, self.pictures = end, pictures

    def append_sampled(self, ids: np.ndarray, logprobs: np.ndarray, version: int) -> None:
        """Takes in what a look sampled; all of it but the last token is in the pool by now."""
        count = ids.size
        end = self.known + count
        self.ids[self.known : end] = ids
        start = int(self.positions[0, self.known - 1]) + 1
        self.positions[:, self.known : end] = np.arange(start, start + count)
        self.feature[self.known : end] = -1
        self.known, self.cached = end, self.cached + count
        self.seen = max(self.seen, self.cached)
        self.sampled += count
        self.left -= count
        self.turn_ids += ids.tolist()
        self.turn_logprobs += logprobs.tolist()
        self.turn_versions += [version] * count


def start(
    number: int, key: np.ndarray, group: tuple[int, ...], prompt: Tokens, budget: int, capacity: int
) -> Sequence:
    """A trajectory that knows its prompt and nothing else."""
    sequence = Sequence(
        number=number,
        key=np.asarray(key, np.uint32),
        group=group,
        prompt=len(prompt),
        ids=np.zeros(capacity, np.int32),
        positions=np.zeros((3, capacity), np.int32),
        feature=np.full(capacity, -1, np.int32),
        left=budget,
    )
    sequence.append(prompt, prompt.pictures)
    return sequence
