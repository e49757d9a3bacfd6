"""The pool of picture features: each distinct picture goes through the vision tower once.

A ring: new features are written where the oldest ones lie. Pictures are known by the hash of their
content, so the same flag in eight samples and five results is one entry.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.engine import steps
from mmsr_jax.inputs import layout
from mmsr_jax.inputs.pictures import picture_batches
from mmsr_jax.types import Picture


class FeaturePool:
    """Features [F, D] on the device, and which rows belong to which picture."""

    def __init__(self, graph, model, config, sharding):
        """`config` is the EngineConfig; `sharding` where the features lie."""
        self.graph, self.model, self.config = graph, model, config
        self.encoded = 0  # pictures that went through the tower
        self.rows = config.patches // model.vision.merge_size**2  # written by one pass
        if config.feature_rows < self.rows:
            raise ValueError(
                f"engine.feature_rows is {config.feature_rows}, one pass of the vision tower "
                f"writes {self.rows} rows (engine.patches / {model.vision.merge_size**2})"
            )
        shape = (config.feature_rows, model.text.hidden)
        self.array = jax.device_put(jnp.zeros(shape, jnp.dtype(model.dtype)), sharding)
        self._where: dict[str, tuple[int, int]] = {}  # digest -> first row, rows
        self._head = 0

    def clear(self) -> None:
        """Forgets everything: the features belong to other weights."""
        self._where.clear()
        self._head = 0

    def size(self, picture: Picture) -> int:
        return picture.patches.shape[0] // self.model.vision.merge_size**2

    def fits(self, pictures: list[Picture]) -> bool:
        """Whether these can be in the pool at the same time."""
        batches = self._batches(_distinct(pictures))
        before = sum(self.size(p) for batch in batches[:-1] for p in batch)
        return not batches or before + self.rows <= self.config.feature_rows

    def ensure(self, params, pictures: list[Picture], soon: list[Picture]) -> dict[str, int]:
        """Sees to it that all of these are there. -> first row of each, by digest.

        A pass costs the same however few pictures are in it: what room is left is filled with
        those of `soon`, which will be asked for before long.

        Raises:
          ValueError: they do not fit (see `fits`).
        """
        wanted = _distinct(pictures)
        if not self.fits(wanted):
            raise ValueError(
                f"{len(wanted)} pictures at once need more than the "
                f"{self.config.feature_rows} rows of engine.feature_rows"
            )
        new = [p for p in wanted if p.digest not in self._where]
        self._encode(params, self._filled(new, soon) if new else [])
        if any(p.digest not in self._where for p in wanted):  # the new ones pushed others out
            self.clear()
            self._encode(params, wanted)
        return {p.digest: self._where[p.digest][0] for p in wanted}

    def _batches(self, pictures: list[Picture]) -> list[list[Picture]]:
        c = self.config
        return picture_batches(
            pictures, patches=c.patches, limit=c.pictures, picture_patches=c.picture_patches
        )

    def _filled(self, pictures: list[Picture], soon: list[Picture]) -> list[Picture]:
        """`pictures`, and those of `soon` that are not there and need no pass of their own."""
        last = self._batches(pictures)[-1]
        used, count, known = sum(len(p.patches) for p in last), len(last), set(self._where)
        known |= {p.digest for p in pictures}
        more = []
        for picture in _distinct(soon):
            used, count = used + len(picture.patches), count + 1
            if used > self.config.patches or count > self.config.pictures:
                break
            if picture.digest in known:
                used, count = used - len(picture.patches), count - 1
            else:
                more.append(picture)
        return pictures + more

    def _encode(self, params, pictures: list[Picture]) -> None:
        for batch in self._batches(pictures):
            if self._head + self.rows > self.config.feature_rows:
                self._head = 0
            self.pass_through(params, batch, self._head)
            self.encoded += len(batch)
            for picture in batch:
                self._where[picture.digest] = (self._head, self.size(picture))
                self._head += self.size(picture)

    def pass_through(self, params, batch: list[Picture], at: int) -> None:
        """One pass of the tower, written from row `at` on; what lay there is forgotten."""
        c = self.config
        self._where = {
            digest: (first, count)
            for digest, (first, count) in self._where.items()
            if first + count <= at or first >= at + self.rows
        }
        vision = layout.vision_inputs(
            batch, self.model.vision, patches=c.patches, pictures_bucket=c.pictures,
            frame=c.picture_patches,
        )  # fmt: skip
        self.array = steps.encode(self.graph, params, self.array, vision, np.int32(at))


def _distinct(pictures: list[Picture]) -> list[Picture]:
    return list({p.digest: p for p in pictures}.values())
