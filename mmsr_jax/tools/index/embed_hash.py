"""Pictures to vectors without weights: what `tools.local` sees (colour grid, histogram, edges).

Finds a picture again that was rescaled, cropped a little, or lit otherwise. It knows nothing of
what a picture shows: two photographs of one building are strangers to it.
"""

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmsr_jax.tools.local import features


class HashEmbedder:
    """Perceptual hash and colour."""

    name = "hash"
    identity = "hash-1"  # goes up when `features` changes
    source = ""

    def __init__(self):
        self.size = len(features(Image.new("RGB", (8, 8))))
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "embed")

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        if len(images) == 1:
            rows = [features(images[0])]
        else:
            rows = list(self._pool.map(features, images))
        vectors = np.array(rows, np.float32).reshape(-1, self.size)
        return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12)
