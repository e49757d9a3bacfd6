"""Pictures to patches, bit for bit as the Qwen2-VL image processor (PIL backend) does it."""

import dataclasses
import io
import json
import math
import operator
import pathlib

import numpy as np
from PIL import Image, ImageOps

from mmsr_jax.inputs import processor_file
from mmsr_jax.tools.decoders import decoded_pixels, known_formats
from mmsr_jax.types import Picture

MAX_DECODED_PIXELS = 89_000_000  # 270 MB as RGB; Pillow itself warns a little above
# What the processor does, by the names of its file; 3 is bicubic.
STEPS = {
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}
MAX_ASPECT = 200  # longer side by shorter side, the limit of Qwen's own resize


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How a picture is resized, normalised and cut.

    The defaults are those of the processor's class; published Qwen2.5-VL checkpoints come with
    max_pixels 12,845,056 in their preprocessor_config.json (`from_hf` reads it).
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136  # after resizing
    max_pixels: int = 1003520
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"images.{name} is {getattr(self, name)}, at least 1 needed")
        if self.max_pixels < self.min_pixels:
            raise ValueError(
                f"images.max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"images.mean {self.mean} and std {self.std} need 3 numbers, no 0")

    @property
    def side(self) -> int:
        """Pixels of one merged token's side; sizes are multiples of it."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path) -> "ImageConfig":
        """Reads preprocessor_config.json, or the image processor in processor_config.json.

        Raises:
            ValueError: neither is there, another processor, or steps that are not built here.
        """
        values, path = processor_file.read(pathlib.Path(folder))
        kind = str(values.get("image_processor_type") or "Qwen2VLImageProcessor")
        if not kind.startswith("Qwen2VLImageProcessor"):
            raise ValueError(f"{path} is for {kind}, Qwen2VLImageProcessor needed")
        for name, fixed in STEPS.items():
            if (value := values.get(name, fixed)) != fixed:
                raise ValueError(f"{path}: {name} is {value!r}, only {fixed} is built here")
        try:
            size = dict(values.get("size") or {})
            # The old names win, as they do in transformers; null says nothing there either.
            for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                values[old] = size.get(new) if values.get(old) is None else values[old]
            names = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
            said = [name for name in names if values.get(name) is not None]
            found = {name: operator.index(values[name]) for name in said}
            for name in ("mean", "std"):
                if (value := values.get(f"image_{name}")) is not None:
                    found[name] = tuple(map(float, value))
            return cls(**found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_hf(self, folder: str | pathlib.Path) -> None:
        """Writes preprocessor_config.json in a form that transformers 4 and 5 both read."""
        values = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **STEPS,
        }
        path = pathlib.Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def decode(data: bytes) -> Image.Image:
    """Opens an encoded picture of unknown origin, wholly decoded and turned upright.

    Raises:
        ValueError: not a picture, a broken one, one that unpacks to more than
            `MAX_DECODED_PIXELS`, or one more than `MAX_ASPECT` times longer than wide.
    """
    if not data:
        raise ValueError("the picture is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=known_formats())
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"{len(data)} bytes are not a picture of a known kind ({', '.join(known_formats())})"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture is too large: {error}") from None
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ValueError(f"the picture is broken: {error}") from error
    width, height = image.size
    _check_aspect(height, width)
    if (pixels := decoded_pixels(image)) > MAX_DECODED_PIXELS:
        tile = "" if pixels == width * height else f", a tile has {pixels}"
        raise ValueError(
            f"the picture is too large: {width} x {height} pixels{tile}, at most "
            f"{MAX_DECODED_PIXELS}"
        )
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
            grey = np.asarray(image).astype(np.uint16) >> 8
            return Image.fromarray(grey.astype(np.uint8))
        return image
    except Exception as error:
        raise ValueError(f"the picture is broken: {error}") from error


def preprocess(
    image: bytes | Image.Image | np.ndarray, config: ImageConfig
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Resizes, normalises and cuts a picture.

    Args:
        image: encoded bytes, a PIL picture, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

    Returns: patches [P, channels * temporal * patch * patch] float32 in the order of
        merge x merge blocks, and the grid (t, h, w) in patches, t = 1.

    Raises:
        ValueError: see `decode`, or an array of another kind.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        image = decode(bytes(image))
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"a picture is bytes, a PIL picture or an array, not {type(image)}")
    width, height = image.size
    height, width = target_size(height, width, config)
    pixels = rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    patch, merge = config.patch_size, config.merge_size
    h, w = height // patch, width // patch
    # [H/28, 2, 14, W/28, 2, 14, C] -> [H/28, W/28, 2, 2, C, 14, 14]
    cut = np.asarray(pixels).reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, patch * patch)
    out = np.empty((h * w, 3, config.temporal_patch_size, patch * patch), np.float32)
    for channel, values in enumerate(_normalised(config)):
        out[:, channel] = values[cut[:, channel]][:, None]
    return out.reshape(h * w, -1), (1, h, w)


def picture(image: bytes | Image.Image | np.ndarray, config: ImageConfig) -> Picture:
    """`preprocess` as a record."""
    patches, grid = preprocess(image, config)
    return Picture(patches, grid)


def target_size(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Pixels (height, width) after resizing: multiples of `config.side` near the same shape.

    Rounds half to even, as the original does (70 is 2.5 * 28 and becomes 56).

    Raises:
        ValueError: a side of 0, or a shape beyond `MAX_ASPECT`.
    """
    _check_aspect(height, width)
    side = config.side
    new_height, new_width = round(height / side) * side, round(width / side) * side
    if new_height * new_width > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        new_height = max(side, math.floor(height / shrink / side) * side)
        new_width = max(side, math.floor(width / shrink / side) * side)
    elif new_height * new_width < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


def _check_aspect(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"the picture has {width} x {height} pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(
            f"the picture has {width} x {height} pixels, one side more than {MAX_ASPECT} times "
            "the other"
        )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        raise ValueError(
            f"an array of {array.dtype} {list(array.shape)} is no picture: "
            "uint8 [H, W], [H, W, 3] or [H, W, 4] needed"
        )
    if 0 in array.shape:
        raise ValueError(f"an array of shape {list(array.shape)} has no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def rgb(image: Image.Image) -> Image.Image:
    """RGB, with whatever is transparent put on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _normalised(config: ImageConfig) -> list[np.ndarray]:
    """Per channel, the float32 value of every grey level [256].

    The original scales in float64, rounds to float32 and normalises in float32; a table of 256
    levels gives the same bits at a fraction of the work.
    """
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return [
        (levels - np.float32(mean)) / np.float32(std)
        for mean, std in zip(config.mean, config.std, strict=True)
    ]
