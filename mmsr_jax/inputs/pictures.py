"""Which pictures go through the vision tower together."""

from mmsr_jax.types import Picture


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
