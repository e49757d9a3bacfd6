"""Which pictures go through the vision tower together, and whether tokens and pictures agree."""

from collections.abc import Sequence

import numpy as np

from mmsr_jax.types import Picture


def check_rows(image_index: np.ndarray, pictures: Sequence[Picture], merge_size: int) -> None:
    """That every picture token stands for a row of these pictures.

    Args:
        image_index: [T] row of the merged picture features of each token, -1 for text.

    Raises:
        ValueError: more image placeholders than pictures. Nothing would go wrong aloud: the
            model would read the placeholder's own embedding.
    """
    there = sum(len(picture.patches) // merge_size**2 for picture in pictures)
    wanted = int(image_index.max(initial=-1)) + 1
    if wanted > there:
        raise ValueError(
            f"more image placeholders than images: a token stands for row {wanted - 1} of the "
            f"pictures, but {len(pictures)} pictures have {there} rows"
        )


def picture_batches(
    pictures: list[Picture], *, patches: int, limit: int, picture_patches: int
) -> list[list[Picture]]:
    """Cuts a list into runs that fit one bucket of `patches` and at most `limit` pictures.

    Raises:
      ValueError: a single picture has more patches than `picture_patches`.
    """
    batches, used = [], 0
    for picture in pictures:
        size = picture.patches.shape[0]
        if size > min(picture_patches, patches):
            raise ValueError(
                f"a picture of {size} patches is larger than the {picture_patches} that the "
                "bucket allows: lower images.max_pixels or raise picture_patches"
            )
        if not batches or used + size > patches or len(batches[-1]) == limit:
            batches.append([])
            used = 0
        batches[-1].append(picture)
        used += size
    return batches
