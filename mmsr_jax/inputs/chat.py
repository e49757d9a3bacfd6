"""Messages to tokens, as Qwen2.5-VL's chat template writes them.

    <|im_start|>role\\n text <|vision_start|> pads <|vision_end|> text <|im_end|>\\n ...

Ids equal those of Hugging Face's template and tokeniser. A conversation is built piece by piece
and never tokenised a second time: `prompt`, then `model_turn` and `tool_turn` in turns, `join`.
"""

from collections.abc import Sequence

import numpy as np

from mmsr_jax.inputs.layout import picture_positions
from mmsr_jax.inputs.tokenizer import Tokenizer
from mmsr_jax.types import Author, Message, Picture, Tokens

DEFAULT_SYSTEM = "You are a helpful assistant."


def prompt(messages: Sequence[Message], tokenizer: Tokenizer, merge_size: int = 2) -> Tokens:
    """A whole conversation up to the point where the assistant begins to speak.

    Without a system message the default system turn is put in front, as the template does; a
    system message that is empty leaves it out.

    Raises:
        ValueError: no message, or a system message that is not the first.
    """
    if not messages:
        raise ValueError("a prompt needs at least one message")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message can only be the first message")
    messages = list(messages)
    if messages[0].role != "system":
        messages.insert(0, Message("system", (DEFAULT_SYSTEM,)))
    elif not any(messages[0].parts):
        del messages[0]
    writer = _Writer(tokenizer, Author.PROMPT, merge_size)
    for message in messages:
        writer.message(message)
        writer.text("\n")
    writer.open_turn("assistant\n")
    return writer.tokens()


def tool_turn(
    message: Message, tokenizer: Tokenizer, start: int, first_feature: int, merge_size: int = 2
) -> Tokens:
    """What follows a model turn that ended with <|im_end|>: a message, and a new turn opened.

    Args:
        start: M-RoPE position of the first token, `next_position` of what came before.
        first_feature: number of merged picture tokens before this piece.
    """
    writer = _Writer(tokenizer, Author.TOOL, merge_size, start, first_feature)
    writer.text("\n")
    writer.message(message)
    writer.text("\n")
    writer.open_turn("assistant\n")
    return writer.tokens()


def model_turn(
    ids: Sequence[int], logprobs: Sequence[float], start: int, versions: Sequence[int] | int = 0
) -> Tokens:
    """What the sampler produced. An image-pad id in it is text like any other.

    Args:
        ids: [T], with the id that ended the turn, if one did.
        logprobs: [T] of the sampler.
        start: M-RoPE position of the first token.
        versions: the engine's version when it sampled each token [T], or all of them.
    """
    ids, logprobs = np.asarray(ids, np.int32), np.asarray(logprobs, np.float32)
    if ids.ndim != 1 or ids.shape != logprobs.shape:
        raise ValueError(f"ids of shape {ids.shape} and log-probs of shape {logprobs.shape}")
    versions = np.asarray(versions, np.int32)
    if versions.shape not in ((), ids.shape):
        raise ValueError(f"ids of shape {ids.shape} and versions of shape {versions.shape}")
    if (versions < 0).any():
        raise ValueError(f"version {versions.min()} of a token that a policy sampled is below 0")
    count = ids.size
    line = np.arange(start, start + count, dtype=np.int32)
    return Tokens(
        ids=ids,
        authors=np.full(count, Author.MODEL, np.int8),
        positions=np.tile(line, (3, 1)),
        image_index=np.full(count, -1, np.int32),
        logprobs=logprobs,
        versions=np.broadcast_to(versions, ids.shape).copy(),
        pictures=(),
        next_position=start + count,
    )


def join(*pieces: Tokens) -> Tokens:
    """One piece after another.

    Raises:
        ValueError: positions or picture rows of a piece do not continue those before it.
    """
    if not pieces:
        raise ValueError("nothing to join")
    position, feature = None, None
    for number, piece in enumerate(pieces):
        if len(piece) and position is not None and (piece.positions[:, 0] != position).any():
            raise ValueError(
                f"piece {number} starts at position {piece.positions[:, 0].tolist()}, "
                f"the one before it ends where {position} follows"
            )
        position = piece.next_position
        rows = piece.image_index[piece.image_index >= 0]
        if bool(rows.size) != bool(piece.pictures):
            raise ValueError(
                f"piece {number} has {rows.size} picture tokens for {len(piece.pictures)} pictures"
            )
        if rows.size:
            first = int(rows[0]) if feature is None else feature
            if (rows != np.arange(first, first + rows.size)).any():
                raise ValueError(
                    f"piece {number} takes picture rows from {rows[0]} on, {first} expected"
                )
            feature = first + rows.size
    return Tokens(
        ids=np.concatenate([piece.ids for piece in pieces]),
        authors=np.concatenate([piece.authors for piece in pieces]),
        positions=np.concatenate([piece.positions for piece in pieces], axis=1),
        image_index=np.concatenate([piece.image_index for piece in pieces]),
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        versions=np.concatenate([piece.versions for piece in pieces]),
        pictures=tuple(picture for piece in pieces for picture in piece.pictures),
        next_position=position,
    )


class _Writer:
    """Collects ids, positions and picture rows of one author."""

    def __init__(self, tokenizer, author, merge_size, position=0, feature=0):
        self.tokenizer, self.author, self.merge_size = tokenizer, author, merge_size
        self.position, self.feature = position, feature
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.pictures: list[Picture] = []

    def text(self, text: str) -> None:
        if text:
            self._line(self.tokenizer.encode(text))

    def open_turn(self, text: str) -> None:
        self._line([self.tokenizer.im_start])
        self.text(text)

    def message(self, message: Message) -> None:
        """One turn, without the line break behind it."""
        # Text is encoded in runs between special tokens, the role's line included, because words
        # may reach across parts: this is how the whole string would be cut.
        run = f"{message.role}\n"
        self._line([self.tokenizer.im_start])
        for part in message.parts:
            if isinstance(part, str):
                run += part
                continue
            self.text(run)
            run = ""
            self._picture(part)
        self.text(run)
        self._line([self.tokenizer.im_end])

    def tokens(self) -> Tokens:
        ids = np.concatenate(self.ids)
        return Tokens(
            ids=ids,
            authors=np.full(ids.size, self.author, np.int8),
            positions=np.concatenate(self.positions, axis=1),
            image_index=np.concatenate(self.rows),
            logprobs=np.zeros(ids.size, np.float32),
            versions=np.full(ids.size, -1, np.int32),
            pictures=tuple(self.pictures),
            next_position=self.position,
        )

    def _line(self, ids: Sequence[int]) -> None:
        line = np.arange(self.position, self.position + len(ids), dtype=np.int32)
        self._append(ids, np.tile(line, (3, 1)), np.full(len(ids), -1, np.int32))
        self.position += len(ids)

    def _picture(self, picture: Picture) -> None:
        self._line([self.tokenizer.vision_start])
        positions, after = picture_positions(picture.grid, self.position, self.merge_size)
        count = positions.shape[1]
        rows = np.arange(self.feature, self.feature + count, dtype=np.int32)
        self._append([self.tokenizer.image_pad] * count, positions, rows)
        self.position, self.feature = after, self.feature + count
        self.pictures.append(picture)
        self._line([self.tokenizer.vision_end])

    def _append(self, ids, positions, rows) -> None:
        self.ids.append(np.asarray(ids, np.int32))
        self.positions.append(positions)
        self.rows.append(rows)
