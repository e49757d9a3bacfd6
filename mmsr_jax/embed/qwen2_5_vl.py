"""Pictures to vectors by the vision tower of a Qwen2.5-VL checkpoint."""

import dataclasses
import functools
import hashlib
import pathlib
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmsr_jax.inputs import images as image_inputs
from mmsr_jax.inputs.layout import vision_inputs
from mmsr_jax.inputs.pictures import picture_batches
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.types import Picture
from mmsr_jax.weights import hf

VERSION = 1  # goes up when the same pictures give other vectors


@dataclasses.dataclass(frozen=True)
class VisionEmbedderConfig:
    """Sizes: what goes through the tower at once always has one shape, so it compiles once."""

    max_pixels: int = 448 * 448  # of a picture after resizing: 1024 patches of 14 x 14
    min_pixels: int = 112 * 112
    pictures: int = 8  # in one pass, at most
    pictures_alone: int = 1  # in a pass for a single picture: a query must not pay for eight
    dtype: str | None = None  # of the computation; None keeps the checkpoint's

    def __post_init__(self):
        if self.pictures < 1 or self.pictures_alone < 1:
            raise ValueError(
                f"pictures {self.pictures} and pictures_alone {self.pictures_alone} must be >= 1"
            )


class VisionEmbedder:
    """The mean over a picture's merged tokens, scaled to length 1.

    The tower was trained to be read by a language model, not to be compared by angles: vectors of
    any two pictures have a large common part. Ranks are what counts, not the values of cosines.

    The checkpoint is loaded whole (`weights.hf.load`), then the language model is dropped.

    Args:
        weights: a folder, or a hub id.

    Raises:
        ValueError: no such checkpoint, or of another architecture.
    """

    name = "qwen2_5_vl"

    def __init__(self, weights: str, config: VisionEmbedderConfig | None = None):
        config = VisionEmbedderConfig() if config is None else config
        loaded = hf.load(weights, dtype=config.dtype)
        vision = loaded.config.vision
        self.config, self.source, self.size = config, str(weights), vision.out_hidden
        self._vision = vision
        self._images = image_inputs.ImageConfig(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.merge_size,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        self._patches = config.max_pixels // vision.patch_size**2
        self._params = loaded.params["vision"]
        text = qwen.abstract(loaded.config)[1]["text"]
        self.identity = _identity(self._params, loaded.folder, config)
        self._encode = jax.jit(
            functools.partial(_encode, loaded.graph, text), static_argnames="groups"
        )
        self._lock = threading.Lock()  # one device: two passes at once would only share it

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> [len(images), out_hidden] float32, each row of length 1."""
        pictures = [image_inputs.picture(image, self._images) for image in images]
        limit = self.config.pictures if len(images) > 1 else self.config.pictures_alone
        patches = limit * self._patches
        batches = picture_batches(
            pictures, patches=patches, limit=limit, picture_patches=self._patches
        )
        rows = [self._batch(batch, patches, limit) for batch in batches]
        return np.concatenate(rows) if rows else np.zeros((0, self.size), np.float32)

    def _batch(self, pictures: list[Picture], patches: int, limit: int) -> np.ndarray:
        merged = self._vision.merge_size**2
        inputs = vision_inputs(
            pictures, self._vision, patches=patches, pictures_bucket=limit, frame=self._patches
        )
        owner = np.full(patches // merged, limit, np.int32)  # the last group is padding
        counts = [len(picture.patches) // merged for picture in pictures]
        owner[: sum(counts)] = np.repeat(np.arange(len(pictures)), counts)
        with self._lock:
            pooled = np.asarray(self._encode(self._params, inputs, owner, groups=limit + 1))
        vectors = pooled[: len(pictures)]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _encode(graph, text, params, inputs, owner, groups: int):
    """Mean features [groups, D] float32 of each picture's merged tokens; owner [M] int32."""
    # Something has to stand where the graph has its language model; it is not used.
    features = qwen.encode_images(graph, {"text": text, "vision": params}, inputs)
    features = features.astype(jnp.float32)
    total = jax.ops.segment_sum(features, owner, groups)
    count = jax.ops.segment_sum(jnp.ones(len(owner)), owner, groups)
    return total / jnp.maximum(count, 1)[:, None]


def _identity(params: dict, folder: pathlib.Path, config: VisionEmbedderConfig) -> str:
    """Of sizes, config.json and a sample of every weight: the same wherever the folder lies."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update(f"{VERSION} {config.max_pixels} {config.min_pixels} {config.dtype}".encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        flat = leaf.reshape(-1)
        sample = np.asarray(flat[:: max(1, flat.size // 64)].astype(jnp.float32))
        digest.update(jax.tree_util.keystr(path).encode() + sample.tobytes())
    return f"qwen2_5_vl-{digest.hexdigest()[:16]}"
