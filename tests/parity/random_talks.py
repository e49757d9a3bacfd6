"""Random conversations with pictures, through the project's own path from pixels to tokens."""

import dataclasses

import numpy as np
from PIL import Image

from mmsr_jax.inputs import chat, images
from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.types import Message, Picture, Tokens

MODES = ("RGB", "L", "RGBA", "P", "1", "LA")


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation as far as the model's next turn, and what a tool says after that turn."""

    tokens: Tokens
    images: tuple[Image.Image, ...]  # of `tokens`, in order
    reply: tuple[str | Picture, ...]  # parts of the tool's message
    reply_images: tuple[Image.Image, ...]


def draw_image(rng: np.random.Generator, side: int) -> Image.Image:
    """Noise in any mode, of odd size, about 1 to 7 merged tokens (`side` pixels) a side."""
    rows = int(rng.integers(1, 8))
    columns = int(rng.integers(1, 8))
    height, width = (
        max(1, n * side + int(rng.integers(-side // 2, side // 2))) for n in (rows, columns)
    )
    mode = MODES[rng.integers(len(MODES))]
    plain = mode if mode in ("RGB", "RGBA", "LA") else "L"
    bands = len(plain)
    pixels = rng.integers(0, 256, height * width * bands, np.uint8).tobytes()
    image = Image.frombytes(plain, (width, height), pixels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        if rng.random() < 0.5:
            image.info["transparency"] = 7
    return image if mode == plain else image.convert(mode)


def draw(seed: int, tokenizer, config: ImageConfig) -> list[Talk]:
    """Four conversations: one without pictures, the others with 1 to 4, of one or more turns."""
    rng = np.random.default_rng([2, seed])
    counts = rng.permutation([0, *rng.integers(1, 5, 3)])
    return [_talk(rng, tokenizer, config, int(count)) for count in counts]


def _talk(rng, tokenizer, config: ImageConfig, count: int) -> Talk:
    turns = int(rng.integers(1, 4))
    turn_of = rng.integers(0, turns, count)  # of each picture
    shown: list[Image.Image] = []
    tokens = None
    for turn in range(turns):
        parts, new = _parts(rng, config, int((turn_of == turn).sum()))
        shown += new
        if tokens is None:
            system = () if rng.random() < 0.5 else (Message("system", (_words(rng),)),)
            tokens = chat.prompt((*system, Message("user", parts)), tokenizer)
            continue
        # A turn of the model: any ids but placeholders, which stand for pictures elsewhere.
        plain = [i for i in range(tokenizer.vocab_size) if i not in _placeholders(tokenizer)]
        said = rng.choice(plain, rng.integers(1, 9))
        spoken = chat.model_turn(said, np.zeros(said.size), tokens.next_position)
        tokens = chat.join(tokens, spoken)
        tokens = chat.join(tokens, _reply(parts, tokens, tokenizer))
    reply, reply_images = _parts(rng, config, int(rng.integers(0, 2)))
    return Talk(tokens, tuple(shown), reply, tuple(reply_images))


def _reply(parts, before: Tokens, tokenizer) -> Tokens:
    features = sum(len(picture.patches) // 4 for picture in before.pictures)
    message = Message("user", parts)
    return chat.tool_turn(message, tokenizer, before.next_position, features)


def go_on(talk: Talk, said: np.ndarray, tokenizer) -> tuple[Tokens, Tokens]:
    """The tool's message after the model said `said`, and the whole conversation with it."""
    spoken = chat.model_turn(said, np.zeros(said.size), talk.tokens.next_position)
    before = chat.join(talk.tokens, spoken)
    reply = _reply(talk.reply, before, tokenizer)
    return reply, chat.join(before, reply)


def _parts(rng, config: ImageConfig, count: int):
    drawn = [draw_image(rng, config.side) for _ in range(count)]
    parts: list[str | Picture] = [_words(rng)]
    for image in drawn:
        parts.append(images.picture(image, config))
        if rng.random() < 0.7:  # else the next picture touches this one
            parts.append(_words(rng))
    return tuple(parts), drawn


def _words(rng) -> str:
    return "".join(rng.choice(list("abc deno .?LP"), rng.integers(1, 12)))


def _placeholders(tokenizer) -> set[int]:
    return {tokenizer.image_pad, tokenizer.special("<|video_pad|>")}
