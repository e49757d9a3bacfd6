"""Pictures in a terminal: two pixels a character, as coloured half blocks."""

import io
import os
import sys

from PIL import Image

from mmsr_jax.tools.decoders import web_formats

COLUMNS = 24
ROWS = 9  # lines, each of two pixels


def shows_colours() -> bool:
    """Is standard output a terminal that says it knows 24-bit colours?"""
    known = os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit")
    return known and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def lines(picture: bytes) -> list[str]:
    """The picture as lines of text with colour codes; none when it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(picture), formats=web_formats()).convert("RGB")
        image.thumbnail((COLUMNS, 2 * ROWS))
    except Exception:  # decoders of hostile bytes raise anything
        return []
    width, height = image.size
    drawn = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            cell = "\x1b[38;2;{};{};{}m".format(*image.getpixel((x, y)))
            if y + 1 < height:
                cell += "\x1b[48;2;{};{};{}m".format(*image.getpixel((x, y + 1)))
            cells.append(cell + "\u2580")
        drawn.append("".join(cells) + "\x1b[0m")
    return drawn
