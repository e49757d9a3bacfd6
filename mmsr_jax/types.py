"""The records that flow from a question to a gradient. Host side: numpy only, no jax.

Letters: `T` tokens, `P` patches, `M` merged image tokens. Ids are the truth; text is a view of
them: whatever the sampler produced is never tokenised a second time.
"""

import dataclasses
import enum
import hashlib

import numpy as np


class Author(enum.IntEnum):
    """Who wrote a token. Only `MODEL` tokens are trained on."""

    PAD = 0
    PROMPT = 1
    MODEL = 2
    TOOL = 3


class Ending(enum.StrEnum):
    """Every way in which an episode can end."""

    ANSWERED = "answered"
    MALFORMED = "malformed"  # neither a tool call nor an answer could be read
    TURN_LIMIT = "turn_limit"  # asked for a tool in the last round
    TOKEN_LIMIT = "token_limit"  # the turn or the whole conversation grew too long
    TOOL_BUDGET = "tool_budget"  # asked for a tool whose calls were used up


@dataclasses.dataclass(frozen=True)
class Example:
    """One question of a dataset."""

    id: str
    question: str
    image: bytes  # encoded picture (PNG, JPEG, ...)
    answers: tuple[str, ...]  # accepted answers, the first is the canonical one
    source: str  # name of the dataset
    category: str = ""  # dataset's own label, e.g. "known" / "unknown"; never shown to the model
    entity: str = ""  # key of the thing the question is about; for standard errors by entity


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture after resize, normalisation and cutting into patches."""

    patches: np.ndarray  # [P, channels * temporal * patch * patch] float32, 2x2-block order
    grid: tuple[int, int, int]  # (t, h, w) in patches

    def __post_init__(self):
        t, h, w = self.grid
        if self.patches.shape[0] != t * h * w:
            raise ValueError(f"{self.patches.shape[0]} patches do not fill a grid of {self.grid}")

    @property
    def digest(self) -> str:
        """Content hash: equal pictures need only one pass of the vision tower."""
        cached = self.__dict__.get("_digest")
        if cached is None:
            cached = hashlib.sha256(
                repr(self.grid).encode() + np.ascontiguousarray(self.patches).tobytes()
            ).hexdigest()
            object.__setattr__(self, "_digest", cached)
        return cached


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation as the chat template sees it."""

    role: str  # "system", "user" or "assistant"
    parts: tuple["str | Picture", ...]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A piece of a conversation as the model sees it.

    `image_index[t]` is the row of the merged image features (all `pictures` one after another)
    that replaces the embedding of token t, -1 for text. An image-pad id that a model sampled
    itself has -1: it is text like any other.
    """

    ids: np.ndarray  # [T] int32
    authors: np.ndarray  # [T] int8, values of Author
    positions: np.ndarray  # [3, T] int32, M-RoPE (temporal, height, width)
    image_index: np.ndarray  # [T] int32
    logprobs: np.ndarray  # [T] float32, sampler's log-prob where author is MODEL, else 0
    # [T] int32, `Engine.version` (weight changes in this process) when the token was sampled, -1
    # where author is not MODEL
    versions: np.ndarray
    pictures: tuple[Picture, ...]
    next_position: int  # M-RoPE position of the token that would follow

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A request to one tool. Tools get the picture and the question, whatever the query says."""

    tool: str  # "image_search" or "text_search"
    query: str  # "" for an image search
    image: bytes  # the user's picture
    question: str


@dataclasses.dataclass(frozen=True)
class ResultItem:
    """One ranked result."""

    title: str
    link: str = ""
    text: str = ""  # passage or summary; empty for pictures
    thumbnail: bytes | None = None  # encoded picture


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came back: ranked items, or a named error; never both, never an exception."""

    tool: str
    items: tuple[ResultItem, ...]
    seconds: float
    error: str | None = None  # e.g. "timeout", "no_results", "failed: ..."


@dataclasses.dataclass(frozen=True)
class Turn:
    """One thing said in an episode, kept for people to read."""

    author: Author
    text: str
    call: ToolCall | None = None  # what the model asked for
    result: ToolResult | None = None  # what the tool answered


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A question and what a teacher would say in each turn: the raw material of SFT."""

    example: Example
    responses: tuple[str, ...]
    results: tuple[ToolResult, ...] = ()  # given instead of the tools' own, by round
    forced: str = ""  # start of the first response that is given, not learned
    kind: str = ""  # for composing a batch


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One finished episode."""

    example: Example
    sample: int  # index within its group
    tokens: Tokens
    turns: tuple[Turn, ...]
    responses: tuple[str, ...]  # text of each model turn
    ending: Ending
    seconds: float = 0.0
    tool_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """All samples of one prompt, complete."""

    example: Example
    trajectories: tuple[Trajectory, ...]
