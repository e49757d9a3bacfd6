"""What turns pictures into vectors: the shape that every embedder has."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class Embedder(Protocol):
    """Pictures to points, near one another where the pictures are alike.

    An index remembers `name` and `identity`, and is only ever asked with an equal embedder.
    """

    name: str  # as in `mmsr search index --pictures NAME`
    identity: str  # of everything that the numbers depend on: version, weights, sizes
    source: str  # where the weights lie; "" without weights
    size: int  # numbers of one vector

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB pictures -> [len(images), size] float32, each row of length 1. From any thread."""
        ...
