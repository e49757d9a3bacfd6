"""One conversation between model, tools and question, as a pure state machine.

    episode = start(example, sample, setting)
    episode, event = said(episode, ids, logprobs, stopped, setting)   # the model spoke
    episode, tokens = answered(episode, result, setting)              # a tool answered

Every function returns a new Episode. No device, no clock, no network in here.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mmsr_jax import protocol as protocol_lib
from mmsr_jax.inputs import chat, images
from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.inputs.tokenizer import Tokenizer
from mmsr_jax.protocol import Protocol
from mmsr_jax.types import (
    Author,
    Ending,
    Example,
    Picture,
    Tokens,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all episodes of a run share."""

    protocol: Protocol
    tokenizer: Tokenizer
    images: ImageConfig
    max_tokens: int  # of the whole conversation (the engine's cache slots)
    turn_tokens: int  # of one turn of the model
    # What training has room for in one conversation; None: no limit. Sampled beyond it, a
    # conversation could not be learned from, and the run would end with it.
    max_pictures: int | None = None  # distinct ones
    max_patches: int | None = None  # of all of them
    picture_patches: int | None = None  # of the largest one

    def fits(self, pictures: Sequence[Picture]) -> bool:
        """Whether these may be the pictures of one conversation."""
        sizes = [len(p.patches) for p in {p.digest: p for p in pictures}.values()]
        return all(
            limit is None or value <= limit
            for value, limit in (
                (len(sizes), self.max_pictures),
                (sum(sizes), self.max_patches),
                (max(sizes, default=0), self.picture_patches),
            )
        )


@dataclasses.dataclass(frozen=True)
class Episode:
    example: Example
    sample: int
    tokens: Tokens
    turns: tuple[Turn, ...] = ()
    responses: tuple[str, ...] = ()
    forced: str = ""  # start of the first response when it was put into the model's mouth
    image_searches: int = 0
    text_searches: int = 0
    ending: Ending | None = None
    tool_seconds: float = 0.0


def start(example: Example, sample: int, setting: Setting, forced: str = "") -> Episode:
    """Opens an episode: the round-1 message as prompt tokens.

    Args:
      forced: beginning of the first response that the model does not choose itself (constant
        policies in evaluation). Its tokens count as prompt.

    Raises:
      ValueError: the picture cannot be decoded or is larger than training has room for, or the
        prompt leaves no room for an answer.
    """
    picture = images.picture(example.image, setting.images)
    if not setting.fits([picture]):
        raise ValueError(
            f"example {example.id}: its picture of {len(picture.patches)} patches is larger than "
            f"training has room for ({setting.picture_patches} patches a picture, "
            f"{setting.max_patches} a conversation)"
        )
    messages = setting.protocol.first_message(example.question, picture)
    tokens = chat.prompt(messages, setting.tokenizer, setting.images.merge_size)
    if forced:
        ids = np.asarray(setting.tokenizer.encode(forced), np.int32)
        piece = chat.model_turn(ids, np.zeros(ids.size, np.float32), tokens.next_position)
        piece = dataclasses.replace(
            piece,
            authors=np.full(ids.size, Author.PROMPT, np.int8),
            versions=np.full(ids.size, -1, np.int32),
        )  # not sampled, hence not trained on
        tokens = chat.join(tokens, piece)
    if len(tokens) >= setting.max_tokens:
        raise ValueError(
            f"example {example.id}: its prompt of {len(tokens)} tokens leaves no room for an "
            f"answer within {setting.max_tokens} tokens"
        )
    return Episode(example, sample, tokens, forced=forced)


def budget(episode: Episode, setting: Setting) -> int:
    """Tokens that the model may write in its next turn, at least 1."""
    return max(min(setting.turn_tokens, setting.max_tokens - len(episode.tokens)), 1)


def said(
    episode: Episode, ids, logprobs, stopped: bool, setting: Setting, versions=0
) -> tuple[Episode, ToolCall | None]:
    """Takes in a turn of the model.

    Args:
      ids: [n] int32 sampled ids, the one that ended the turn included.
      logprobs: [n] float32 of the sampler.
      stopped: the model ended its turn itself.
      versions: [n] int32, or one for all: the engine's version when it sampled each id.

    Returns:
      The episode and the tool call to make, or None when the episode has ended.
    """
    piece = chat.model_turn(ids, logprobs, episode.tokens.next_position, versions)
    text = setting.tokenizer.decode(
        [int(i) for i in ids[: len(ids) - 1 if stopped else len(ids)]], skip_special=False
    )
    if not episode.responses:
        text = episode.forced + text
    episode = dataclasses.replace(
        episode,
        tokens=chat.join(episode.tokens, piece),
        responses=(*episode.responses, text),
    )
    action = protocol_lib.parse(text)
    if not stopped:
        return _end(episode, text, Ending.TOKEN_LIMIT), None
    if isinstance(action, protocol_lib.Malformed):
        return _end(episode, text, Ending.MALFORMED), None
    if isinstance(action, protocol_lib.Answer):
        return _end(episode, text, Ending.ANSWERED), None
    refusal = setting.protocol.allowed(
        len(episode.responses), episode.image_searches, episode.text_searches, action
    )
    if refusal is not None:
        return _end(episode, text, refusal), None
    is_image = isinstance(action, protocol_lib.ImageSearch)
    call = ToolCall(
        tool="image_search" if is_image else "text_search",
        query="" if is_image else action.query,
        image=episode.example.image,
        question=episode.example.question,
    )
    episode = dataclasses.replace(
        episode,
        turns=(*episode.turns, Turn(Author.MODEL, text, call=call)),
        image_searches=episode.image_searches + is_image,
        text_searches=episode.text_searches + (not is_image),
    )
    return episode, call


def answered(
    episode: Episode, result: ToolResult, setting: Setting
) -> tuple[Episode, Tokens | None]:
    """Takes in a tool's result.

    Returns:
      The episode and the tokens that the model has to read, or None when they do not fit any
      more and the episode has ended.
    """
    thumbnails = []
    items = []
    for item in result.items:
        if len(items) == setting.protocol.max_result_items:
            break  # no more would be shown, however many pictures a tool has sent
        if item.thumbnail is not None:
            try:
                thumbnails.append(_thumbnail(item.thumbnail, setting.images))
            except ValueError:  # a broken thumbnail loses its result, not the episode
                continue
        items.append(item)
    result = dataclasses.replace(result, items=tuple(items))
    # Results are cut at result boundaries until the turn fits with room for an answer.
    piece = None
    for kept in range(len(items), -1, -1):
        cut = dataclasses.replace(
            result,
            items=tuple(items[:kept]),
            error=result.error or (None if kept else "results too long"),
        )
        if not items:
            cut = result
        message = setting.protocol.result_message(
            cut, episode.example.question, thumbnails[:kept] if thumbnails else []
        )
        piece = chat.tool_turn(
            message,
            setting.tokenizer,
            episode.tokens.next_position,
            _features(episode.tokens, setting),
            setting.images.merge_size,
        )
        pictures = (*episode.tokens.pictures, *piece.pictures)
        if len(episode.tokens) + len(piece) < setting.max_tokens - 8 and setting.fits(pictures):
            break
    else:
        return _end_after(episode, result, Ending.TOKEN_LIMIT), None
    episode = dataclasses.replace(
        episode,
        tokens=chat.join(episode.tokens, piece),
        turns=(
            *episode.turns,
            Turn(Author.TOOL, setting.tokenizer.decode(piece.ids.tolist()), result=cut),
        ),
        tool_seconds=episode.tool_seconds + result.seconds,
    )
    return episode, piece


def finish(episode: Episode, seconds: float) -> Trajectory:
    """The record of an ended episode."""
    if episode.ending is None:
        raise ValueError(f"episode {episode.example.id} has not ended")
    return Trajectory(
        example=episode.example,
        sample=episode.sample,
        tokens=episode.tokens,
        turns=episode.turns,
        responses=episode.responses,
        ending=episode.ending,
        seconds=seconds,
        tool_seconds=episode.tool_seconds,
    )


@functools.lru_cache(maxsize=1024)
def _thumbnail(data: bytes, config: ImageConfig) -> Picture:
    """Results repeat, above all within a group: each thumbnail is prepared once."""
    return images.picture(data, config)


def _features(tokens: Tokens, setting: Setting) -> int:
    merge = setting.images.merge_size**2
    return sum(p.patches.shape[0] // merge for p in tokens.pictures)


def _end(episode: Episode, text: str, ending: Ending) -> Episode:
    turns = (*episode.turns, Turn(Author.MODEL, text))
    return dataclasses.replace(episode, turns=turns, ending=ending)


def _end_after(episode: Episode, result: ToolResult, ending: Ending) -> Episode:
    turns = (*episode.turns, Turn(Author.TOOL, "", result=result))
    seconds = episode.tool_seconds + result.seconds
    return dataclasses.replace(episode, turns=turns, ending=ending, tool_seconds=seconds)
