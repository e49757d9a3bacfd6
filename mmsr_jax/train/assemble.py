"""From conversations to micro-batches of one fixed shape. Host side, numpy.

Conversations are packed: several short ones share a row, told apart by segment ids. Pictures are
shared too: equal pictures of a micro-batch (a group asks about one picture, and gets the same
thumbnails back) go through the vision tower once, and every token that needs a feature points at
it. Letters: `B` rows, `T` tokens a row.
"""

import dataclasses

import numpy as np

from mmsr_jax.inputs import layout
from mmsr_jax.inputs.pictures import check_rows
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.train.batch import TrainBatch
from mmsr_jax.types import Author, Tokens


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Shapes of a micro-batch: each is compiled in.

    Conversations are cut to what one of them may be, while they are sampled and evaluated.
    """

    rows: int = 16  # B
    length: int = 192  # T; the longest conversation must fit
    patches: int = 1536  # patches of its distinct pictures
    pictures: int = 64  # distinct pictures
    picture_patches: int = 24  # patches of the largest one


@dataclasses.dataclass(frozen=True)
class Piece:
    """One conversation with what the loss needs to know of it."""

    tokens: Tokens
    advantage: float = 0.0
    weight: float = 1.0  # of the whole conversation, relative to the others
    name: str = ""  # whose it is, for messages


def assemble(
    pieces: list[Piece], model: ModelConfig, config: PackConfig, *, aggregate: str, pad_id: int = 0
) -> list[TrainBatch]:
    """Packs conversations into micro-batches.

    Args:
      aggregate: "token": every model token of the step weighs the same (times its
        conversation's weight); "sequence": every conversation weighs the same, its tokens share
        it. All weights of the step sum to 1.

    Returns:
      Micro-batches of numpy arrays.

    Raises:
      ValueError: a conversation longer than a row, with more pictures than fit, with tokens
        that stand for pictures it does not have, or in which the model says what it cannot say.
    """
    if not pieces:
        raise ValueError("nothing to train on: no conversation was given")
    for number, piece in enumerate(pieces):
        _check_said(piece, number, model)
    waiting = list(zip(pieces, _weights(pieces, aggregate), strict=True))
    batches = []
    while waiting:
        # Each micro-batch is offered all that is left, so short conversations fill the gaps that
        # long ones leave. The order stays otherwise: neighbours share pictures.
        micro = _Micro(model, config, pad_id)
        left = [(piece, weight) for piece, weight in waiting if not micro.add(piece, weight)]
        if len(left) == len(waiting):
            tokens = left[0][0].tokens
            raise ValueError(
                f"a conversation of {len(tokens)} tokens and {len(tokens.pictures)} pictures does "
                f"not fit a micro-batch of rows of {config.length} tokens, {config.pictures} "
                f"pictures of at most {config.picture_patches} patches, {config.patches} in all"
            )
        waiting = left
        batches.append(micro.finish())
    return batches


def _check_said(piece: Piece, number: int, model: ModelConfig) -> None:
    """An id that is never sampled has no log-prob to learn from: the loss would be 1e30."""
    said = piece.tokens.ids[piece.tokens.authors == Author.MODEL]
    if (outside := said[(said < 0) | (said >= model.text.vocab_size)]).size:
        why = f"outside the vocabulary of {model.text.vocab_size}"
        said = outside
    elif (said := said[model.unsampled[said]]).size:
        why = "never sampled (model.unsampled_ids, sampled_vocab)"
    else:
        return
    name = piece.name or f"conversation {number}"
    raise ValueError(
        f"{name}: the model says id {said[0]}, which is {why}; what the model wrote must come "
        "from its sampler, or from text through the tokenizer"
    )


def _weights(pieces: list[Piece], aggregate: str) -> list[float]:
    """Weight of one model token of each piece."""
    counts = np.array([(p.tokens.authors == Author.MODEL).sum() for p in pieces], np.float64)
    own = np.array([p.weight for p in pieces], np.float64)
    if aggregate == "token":
        raw = own
    elif aggregate == "sequence":
        raw = own / np.maximum(counts, 1)
    else:
        raise ValueError(f"aggregate must be 'token' or 'sequence', got {aggregate!r}")
    total = (raw * counts).sum()
    return list(raw / total if total > 0 else np.zeros_like(raw))


class _Micro:
    """A micro-batch in the making: first fit over its rows."""

    def __init__(self, model: ModelConfig, config: PackConfig, pad_id: int):
        self.model, self.config = model, config
        shape = (config.rows, config.length)
        self.ids = np.full(shape, pad_id, np.int32)
        self.positions = np.zeros((3, *shape), np.int32)
        self.segments = np.zeros(shape, np.int32)
        self.index = np.full(shape, -1, np.int32)
        self.targets = np.full(shape, pad_id, np.int32)
        self.mask, self.weights, self.advantages, self.sampler = (
            np.zeros(shape, np.float32) for _ in range(4)
        )
        self.used = np.zeros(config.rows, np.int64)
        self.pictures = {}  # digest -> (first feature row, Picture), in order
        self.patches = 0

    def add(self, piece: Piece, weight: float) -> bool:
        """Puts a conversation in; False when it does not fit any more."""
        tokens, c = piece.tokens, self.config
        n = len(tokens)
        check_rows(tokens.image_index, tokens.pictures, self.model.vision.merge_size)
        rows = np.flatnonzero(self.used + n <= c.length)
        new = {p.digest: p for p in tokens.pictures if p.digest not in self.pictures}
        patches = sum(p.patches.shape[0] for p in new.values())
        too_large = any(p.patches.shape[0] > c.picture_patches for p in new.values())
        if (
            not rows.size
            or self.patches + patches > c.patches
            or len(self.pictures) + len(new) > c.pictures
            or too_large
        ):
            return False
        merge = self.model.vision.merge_size**2
        for digest, picture in new.items():
            self.pictures[digest] = (self.patches // merge, picture)
            self.patches += picture.patches.shape[0]
        row, start = rows[0], self.used[rows[0]]
        at = slice(start, start + n)
        self.ids[row, at] = tokens.ids
        self.positions[:, row, at] = tokens.positions
        self.segments[row, at] = self.segments[row].max() + 1
        first = 0
        for picture in tokens.pictures:
            count = picture.patches.shape[0] // merge
            own = (tokens.image_index >= first) & (tokens.image_index < first + count)
            base = self.pictures[picture.digest][0]
            self.index[row, at][own] = tokens.image_index[own] - first + base
            first += count
        # Entry t speaks of token t + 1; the last token of a conversation predicts nothing.
        before = slice(start, start + n - 1)
        is_model = (tokens.authors[1:] == Author.MODEL).astype(np.float32)
        self.targets[row, before] = tokens.ids[1:]
        self.mask[row, before] = is_model
        self.weights[row, before] = is_model * weight
        self.advantages[row, before] = is_model * piece.advantage
        self.sampler[row, before] = is_model * tokens.logprobs[1:]
        self.used[row] += n
        return True

    def finish(self) -> TrainBatch:
        c = self.config
        vision = layout.vision_inputs(
            [p for _, p in self.pictures.values()], self.model.vision, patches=c.patches,
            pictures_bucket=c.pictures, frame=c.picture_patches,
        )  # fmt: skip
        inputs = qwen.Inputs(
            ids=self.ids,
            positions=self.positions,
            segments=self.segments,
            image_index=self.index,
            vision=vision,
        )
        return TrainBatch(
            inputs=inputs,
            targets=self.targets,
            mask=self.mask,
            weights=self.weights,
            advantages=self.advantages,
            sampler_logprobs=self.sampler,
        )
