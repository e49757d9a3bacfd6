"""Seeded changes that turn one flag into many pictures of it."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageFilter


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far a picture may stray from its flag. All zero: only a resize.

    The strengths are mild on purpose: with these, the local index still finds the right flag
    among all of them in more than 99 pictures of 100 (tests/data/test_flags_search.py).
    """

    crop: float = 0.06  # largest shift of the window, as a share of the flag's sides
    zoom: float = 0.08  # window sides are (1 - zoom) to (1 + zoom) of the flag's
    light: float = 0.12  # largest change of brightness, as a share of full scale
    contrast: float = 0.20  # contrast is scaled by (1 - contrast) to (1 + contrast)
    blur: float = 0.8  # largest Gaussian radius, pixels
    noise: float = 0.02  # largest standard deviation of pixel noise, share of full scale


def on_white(picture: bytes | Image.Image) -> Image.Image:
    """Decodes a picture; transparent parts become white."""
    image = picture if isinstance(picture, Image.Image) else Image.open(io.BytesIO(picture))
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def png(image: Image.Image) -> bytes:
    """Encodes as PNG, quickly rather than tightly."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def augment(
    picture: bytes | Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    strengths: Augmentation = Augmentation(),
) -> bytes:
    """A changed picture of exactly `size` = (width, height) pixels, as PNG bytes.

    The same generator state gives the same bytes. Where the window leaves the flag, it shows a
    plain grey.
    """
    image = on_white(picture)
    width, height = image.size
    scale = 1 + rng.uniform(-strengths.zoom, strengths.zoom)
    shift = rng.uniform(-strengths.crop, strengths.crop, 2)
    grey = int(rng.integers(0, 256))
    # The window's centre moves by `shift`, its sides are `scale` of the flag's.
    left, top = ((1 - scale) / 2 + shift[0]) * width, ((1 - scale) / 2 + shift[1]) * height
    window = (left, top, left + scale * width, top + scale * height)
    image = image.transform(
        size,
        Image.Transform.EXTENT,
        window,
        resample=Image.Resampling.BICUBIC,
        fillcolor=(grey, grey, grey),
    )
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, strengths.blur)))
    values = np.asarray(image, np.float32) / 255
    gain = 1 + rng.uniform(-strengths.contrast, strengths.contrast)
    values = (values - 0.5) * gain + 0.5 + rng.uniform(-strengths.light, strengths.light)
    values = values + rng.normal(0, rng.uniform(0, strengths.noise), values.shape)
    return png(Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)))
