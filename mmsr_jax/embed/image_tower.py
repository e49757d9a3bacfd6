"""Pictures to vectors by the vision tower of a CLIP or SigLIP checkpoint."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from mmsr_jax.inputs.fixed_images import FixedImageConfig, pixels
from mmsr_jax.model import image_tower
from mmsr_jax.weights.image_tower import LoadedTower, load

VERSION = 1  # goes up when the same pictures give other vectors


@dataclasses.dataclass(frozen=True)
class TowerEmbedderConfig:
    """Sizes: what goes through the tower at once has one of two shapes, so it compiles twice."""

    pictures: int = 16  # in one pass
    pictures_alone: int = 1  # in a pass for a single picture: a query must not pay for many
    dtype: str = "float32"  # of parameters and computation, whatever the files hold

    def __post_init__(self):
        if self.pictures < 1 or self.pictures_alone < 1:
            raise ValueError(
                f"pictures {self.pictures} and pictures_alone {self.pictures_alone} must be >= 1"
            )


class TowerEmbedder:
    """What the model itself compares pictures and texts by: CLIP's projection, SigLIP's pooling.

    Args:
        name: clip or siglip; the folder must be of that kind.
        weights: a folder, or a hub id.

    Raises:
        ValueError: no such checkpoint, of another model, or one whose processor makes pictures of
            another size than its tower takes.
    """

    def __init__(self, name: str, weights: str, config: TowerEmbedderConfig | None = None):
        config = TowerEmbedderConfig() if config is None else config
        loaded = load(weights, dtype=config.dtype)
        kind, side = loaded.config.kind, loaded.config.image_size
        if kind != name:
            raise ValueError(
                f"{weights} is a {kind} model, not {name}: give its pictures as {kind}"
            )
        self._images = FixedImageConfig.from_hf(loaded.folder)
        if self._images.shape != (side, side):
            height, width = self._images.shape
            raise ValueError(
                f"{loaded.folder}: its processor makes pictures of {width} x {height} pixels, its "
                f"vision tower takes {side} x {side}"
            )
        self.name, self.config, self.source = name, config, str(weights)
        self.size = loaded.config.size
        self.identity = _identity(loaded, self._images)
        self._side, self._params = side, loaded.params
        self._encode = jax.jit(functools.partial(image_tower.encode, loaded.graph))
        self._lock = threading.Lock()  # one device: two passes at once would only share it

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pictures -> [len(images), size] float32, each row of length 1.

        Raises:
            ValueError: a strip (`inputs.images.MAX_ASPECT`), or weights that give no finite vector.
        """
        limit = self.config.pictures if len(images) > 1 else self.config.pictures_alone
        rows = [np.zeros((0, self.size), np.float32)]
        for begin in range(0, len(images), limit):
            rows.append(self._batch(images[begin : begin + limit], limit))
        return np.concatenate(rows)

    def _batch(self, images: Sequence[Image.Image], limit: int) -> np.ndarray:
        batch = np.zeros((limit, 3, self._side, self._side), np.float32)
        for place, image in zip(batch, images, strict=False):
            place[...] = pixels(image, self._images)
        with self._lock:
            vectors = np.asarray(self._encode(self._params, batch))[: len(images)]
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.source} gives vectors that are not finite: damaged weights?")
        return vectors


def _identity(loaded: LoadedTower, images: FixedImageConfig) -> str:
    """Of sizes, preprocessing and every weight: the same wherever the folder lies, however it is
    cut into files."""
    digest = hashlib.sha256(f"{VERSION} {loaded.config} {images}".encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(loaded.params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8))
    return f"{loaded.config.kind}-{digest.hexdigest()[:16]}"
