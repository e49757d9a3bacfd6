"""Which of Pillow's decoders a stranger's picture may reach, and how much it would fill."""

import functools

from PIL import Image

# What people put on web pages; some of Pillow's other decoders start programs.
# (MPO comes under JPEG's name: a name that Pillow does not know would end the search.)
# Not ICO: it is decoded before it says how large it is.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow opens: at any other name it would give up."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def web_formats() -> tuple[str, ...]:
    """The same without PPM, whose decoder is slow Python."""
    return tuple(name for name in known_formats() if name != "PPM")


def decoded_pixels(image: Image.Image) -> int:
    """Pixels that decoding an open picture fills: a TIFF's tile may be larger than the TIFF."""
    tags = getattr(image, "tag_v2", {})
    sides = (tags.get(322), tags.get(323))  # TileWidth, TileLength
    tile = sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else 0
    return max(image.width * image.height, tile)
