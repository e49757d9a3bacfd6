"""What goes into the engine and what comes out of it. Host side: numpy only."""

import dataclasses
import hashlib

import numpy as np

from mmsr_jax.types import Picture, Tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and the samples wanted of it."""

    prompt: Tokens
    streams: tuple[np.ndarray, ...]  # one [2] uint32 a sample, from `stream`
    budget: int  # tokens of the first turn at most


@dataclasses.dataclass(frozen=True)
class Resume:
    """What a paused trajectory has to read before it goes on."""

    number: int  # of the trajectory
    tokens: Tokens
    pictures: tuple[Picture, ...]  # every picture of the conversation so far, these included
    budget: int


@dataclasses.dataclass(frozen=True)
class SampledTurn:
    """What a trajectory sampled until it paused."""

    number: int
    ids: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int32, number of weight changes before each token was sampled
    stopped: bool  # True: it ended its turn; False: budget or slots ran out


def stream(*parts) -> np.ndarray:
    """Key data [2] uint32 of the random stream named by `parts` (run seed, example id, ...)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.frombuffer(digest[:8], np.uint32).copy()
