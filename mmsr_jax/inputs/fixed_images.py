"""Pictures of one fixed size, as the processors of CLIP and SigLIP (PIL backend) make them.

Bit for bit: resizing is Pillow's, on whole bytes, and normalising rounds where theirs does.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from mmsr_jax.inputs import processor_file
from mmsr_jax.inputs.images import MAX_ASPECT, rgb

_CLIP = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
# What a file leaves out, by processor: the attributes of transformers' classes.
_SHARED = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
}
DEFAULTS = {
    "CLIPImageProcessor": _SHARED | _CLIP,
    "CLIPFeatureExtractor": _SHARED | _CLIP,  # its name until 2022
    "SiglipImageProcessor": _SHARED | _SIGLIP,
}
MAX_EXCESS = 8  # shorter side by crop; the pixels between them are made and thrown away


@dataclasses.dataclass(frozen=True)
class FixedImageConfig:
    """How a picture comes to the size that a tower wants."""

    resize: tuple[int, int] | None  # (height, width), whatever the picture's shape
    shortest: int | None  # or: the shorter side, the shape is kept
    crop: tuple[int, int] | None  # (height, width) of the middle, filled up with black
    resample: int  # a `PIL.Image.Resampling`
    scale: float | None  # of grey levels 0 to 255
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self):
        if self.resize and self.shortest:
            raise ValueError(f"resized to {self.resize} or to a side of {self.shortest}, not both")
        if not self.crop and not self.resize:
            raise ValueError("neither a crop nor a size of both sides: pictures would differ")
        for name, sides in (("resize", self.resize), ("crop", self.crop)):
            if sides and min(sides) < 1:
                raise ValueError(f"{name} {sides} has a side below 1")
        if self.shortest is not None and self.shortest < 1:
            raise ValueError(f"a shorter side of {self.shortest}, at least 1 needed")
        if self.crop and self.shortest and self.shortest > MAX_EXCESS * max(self.crop):
            raise ValueError(
                f"a shorter side of {self.shortest} for a crop of {self.crop}: at most "
                f"{MAX_EXCESS} times as much"
            )
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"resample {self.resample!r} is none of Pillow's (0 to 5)")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean {self.mean} and std {self.std} come together")
        if self.std is not None and (len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} need 3 numbers, no 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in which all pictures come out."""
        return self.crop or self.resize

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path) -> "FixedImageConfig":
        """Reads preprocessor_config.json, or the image processor in processor_config.json.

        Raises:
            ValueError: neither is there, another processor, or something that is not built here.
        """
        values, path = processor_file.read(pathlib.Path(folder))
        kind = values.get("image_processor_type") or values.get("feature_extractor_type")
        known = str(kind).removesuffix("Fast").removesuffix("Pil")
        if known not in DEFAULTS:
            raise ValueError(f"{path} is for {kind}, one of {', '.join(DEFAULTS)} is needed")
        values = DEFAULTS[known] | {k: v for k, v in values.items() if v is not None}
        if values["do_pad"]:
            raise ValueError(f"{path} asks for do_pad, which is not built here")
        try:
            resize, shortest = None, None
            if values["do_resize"]:
                resize, shortest = _size(values["size"], square=False)
            crop = None
            if values["do_center_crop"]:
                crop, edge = _size(values["crop_size"], square=True)
                if edge:
                    raise ValueError(f"crop_size {values['crop_size']!r} needs height and width")
            normal = values["do_normalize"]
            return cls(
                resize=resize,
                shortest=shortest,
                crop=crop,
                resample=values["resample"],
                scale=float(values["rescale_factor"]) if values["do_rescale"] else None,
                mean=_three(values["image_mean"]) if normal else None,
                std=_three(values["image_std"]) if normal else None,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def pixels(image: Image.Image, config: FixedImageConfig) -> np.ndarray:
    """A picture as [3, *config.shape] float32, whatever is transparent put on white.

    Raises:
        ValueError: a side of 0, or one more than `MAX_ASPECT` times the other.
    """
    levels = fitted(image, config)
    out = np.empty((3, *levels.shape[:2]), np.float32)
    for channel, table in enumerate(_tables(config)):
        out[channel] = table[levels[..., channel]]
    return out


def fitted(image: Image.Image, config: FixedImageConfig) -> np.ndarray:
    """The picture resized and cropped, not yet normalised: [*config.shape, 3] uint8."""
    width, height = image.size
    if not width or not height or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the picture has {width} x {height} pixels: none, or one side more than {MAX_ASPECT} "
            "times the other"
        )
    image = rgb(image)
    target = config.resize
    if config.shortest:
        longer = int(config.shortest * max(width, height) / min(width, height))
        upright = width <= height
        target = (longer, config.shortest) if upright else (config.shortest, longer)
    if target:
        image = image.resize(target[::-1], Image.Resampling(config.resample))
    levels = np.asarray(image)
    return _cropped(levels, *config.crop) if config.crop else levels


def _cropped(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of [H, W, 3]; what a picture is short of is black."""
    for axis, side in ((0, height), (1, width)):
        there = levels.shape[axis]
        # Both roundings are the original's: the smaller half is left away before, or added behind.
        if there >= side:
            begin = (there - side) // 2
            levels = levels[(slice(None),) * axis + (slice(begin, begin + side),)]
        else:
            pad = [(0, 0)] * 3
            pad[axis] = (math.ceil((side - there) / 2), (side - there) // 2)
            levels = np.pad(levels, pad)
    return levels


@functools.lru_cache(maxsize=16)
def _tables(config: FixedImageConfig) -> list[np.ndarray]:
    """Per channel, the float32 value of every grey level [256].

    The original scales in float64, rounds to float32 and normalises in float32.
    """
    levels = np.arange(256, dtype=np.float64)
    if config.scale is not None:
        levels = levels * config.scale
    levels = levels.astype(np.float32)
    if config.mean is None:
        return [levels] * 3
    return [
        (levels - np.float32(mean)) / np.float32(std)
        for mean, std in zip(config.mean, config.std, strict=True)
    ]


def _size(given: Any, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """((height, width), None) or (None, shorter side), of the ways in which sizes were written.

    Args:
        square: what a bare number means: both sides, or the shorter one.
    """
    if isinstance(given, int):
        return ((given, given), None) if square else (None, given)
    if isinstance(given, list) and len(given) == 2:
        given = {"height": given[0], "width": given[1]}
    if isinstance(given, dict):
        kept = {name: int(value) for name, value in given.items() if value is not None}
        if kept.keys() == {"height", "width"}:
            return (kept["height"], kept["width"]), None
        if kept.keys() == {"shortest_edge"}:
            return None, kept["shortest_edge"]
    raise ValueError(
        f"a size of {given!r} is not built here, only height and width, or shortest_edge"
    )


def _three(given: Any) -> tuple[float, float, float]:
    return tuple(map(float, given if isinstance(given, list | tuple) else [given] * 3))
