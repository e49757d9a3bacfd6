"""Pictures from outside: decoded and encoded anew before anything else touches them.

What comes out is a plain PNG or JPEG of bounded size without metadata; bytes that a stranger
chose go no further than the decoder.
"""

import dataclasses
import io

from PIL import Image, ImageOps

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.decoders import decoded_pixels, web_formats

MAX_RATIO = 200  # Qwen2.5-VL takes no picture longer than 200 times its width


@dataclasses.dataclass(frozen=True)
class PictureLimits:
    """What is taken in, and what comes out."""

    max_bytes: int = 10 << 20  # encoded, as it came
    max_pixels: int = 40_000_000  # decoded; 160 MB as RGBA
    max_side: int = 1024  # of what comes out, in pixels
    quality: int = 90  # of JPEG

    def __post_init__(self):
        for name in ("max_bytes", "max_pixels", "max_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality must be from 1 to 95, not {self.quality}")


def reencode(picture: bytes, limits: PictureLimits = PictureLimits()) -> bytes:
    """A picture as PNG (if it is small, or came without loss) or JPEG; equal input, equal output.

    The first frame, turned as its EXIF says, on white where it is clear. Blocks: call it in a
    thread.

    Raises:
        ToolError: "too_large" for bytes or pixels over the limit, "bad_picture" for the rest.
    """
    if len(picture) > limits.max_bytes:
        raise ToolError(
            "too_large", f"a picture of {len(picture)} bytes, {limits.max_bytes} allowed"
        )
    try:
        # Pillow may warn of many pixels here; `catch_warnings` is not for threads, so it may.
        image = Image.open(io.BytesIO(picture), formats=web_formats())
        lossy = image.format in ("JPEG", "MPO", "WEBP", "AVIF")
        width, height = image.size
        if (pixels := decoded_pixels(image)) > limits.max_pixels:
            tile = "" if pixels == width * height else f", a tile has {pixels}"
            text = f"a picture of {width} x {height} pixels{tile}, {limits.max_pixels} allowed"
            raise ToolError("too_large", text)
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ToolError("bad_picture", f"{width} x {height} pixels are a line")
        image.draft("RGB", (limits.max_side, limits.max_side))  # JPEG decodes small at once
        image = _shown(image)
        image.thumbnail((limits.max_side, limits.max_side), Image.Resampling.LANCZOS)
        image.info.clear()  # comments and colour profiles would be written too
        out = io.BytesIO()
        if lossy:
            image.save(out, "JPEG", quality=limits.quality)
        else:
            image.save(out, "PNG")
        return out.getvalue()
    except ToolError:
        raise
    except Image.DecompressionBombError as error:
        text = f"more pixels than the {limits.max_pixels} allowed"
        raise ToolError("too_large", text) from error
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ToolError("bad_picture", f"it cannot be decoded: {type(error).__name__}") from error


def _shown(image: Image.Image) -> Image.Image:
    """The picture as a viewer would show it, RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L"):
        return image.convert("RGB")
    if image.mode.startswith(("I", "F")):  # 16 bits and more, by range
        low, high = image.getextrema()
        scale = 255.0 / (high - low) if high > low else 0.0
        return image.convert("F").point(lambda v: (v - low) * scale).convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")
