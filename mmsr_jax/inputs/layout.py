"""Plans made by the host in numpy: rotary positions, and the groups of the vision tower."""

from collections.abc import Sequence

import numpy as np

from mmsr_jax.inputs.pad import ladder
from mmsr_jax.model.config import ModelConfig, VisionConfig
from mmsr_jax.model.vision import VisionInputs
from mmsr_jax.types import Picture


def picture_positions(
    grid: tuple[int, int, int], start: int, merge_size: int
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of one picture's merged tokens, and of the token after it.

    Args:
        grid: (t, h, w) in patches.
        start: position of the token that would stand here if it were text.

    Returns: positions [3, M] int32 and the next position: a picture advances by its longer side
        in merged tokens, not by their number.
    """
    t, h, w = (int(size) for size in grid)
    if t < 1 or h < 1 or w < 1 or h % merge_size or w % merge_size:
        raise ValueError(f"grid {(t, h, w)} does not divide into blocks of side {merge_size}")
    rows, columns = h // merge_size, w // merge_size
    positions = np.indices((t, rows, columns), dtype=np.int32).reshape(3, -1)
    return positions + np.int32(start), start + max(rows, columns)


def positions(
    ids: np.ndarray, grids: np.ndarray | Sequence, config: ModelConfig
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of one row without padding (the rule of `get_rope_index`).

    Args:
        ids: [T] tokens; every run of image tokens is one or more pictures of `grids`.
        grids: [n, 3] (t, h, w) in patches, in order.

    Returns: positions [3, T] int32, and delta: what to add to the number of tokens so far to get
        the next text position.

    Raises:
        ValueError: image tokens and grids that do not agree.
    """
    merge = config.vision.merge_size
    is_image = np.asarray(ids) == config.image_token_id
    sizes = [int(np.prod(grid)) // merge**2 for grid in grids]
    if int(is_image.sum()) != sum(sizes):
        raise ValueError(
            f"{int(is_image.sum())} image tokens, but {len(sizes)} pictures need {sum(sizes)}"
        )
    out = np.zeros((3, len(is_image)), np.int32)
    at, position = 0, 0
    for grid, size in zip(grids, sizes, strict=True):
        first = at + int(np.argmax(is_image[at:]))
        if not is_image[first : first + size].all():
            raise ValueError(f"the picture at token {first} is not a whole run of {size} tokens")
        out[:, at:first] = np.arange(position, position + first - at)
        position += first - at
        out[:, first : first + size], position = picture_positions(grid, position, merge)
        at = first + size
    out[:, at:] = np.arange(position, position + len(is_image) - at)
    return out, position + len(is_image) - at - len(is_image)


def most_windows(patches: int, pictures: int, frame: int, config: VisionConfig) -> int:
    """The most windows that any pictures within these buckets can have.

    A grid of m merged tokens has ceil(rows/4) * ceil(columns/4) <= m/4 + 3/4 windows of side 4;
    a strip one token high has that many.
    """
    side, merged = config.window_tokens, config.merge_size**2
    total = (patches // merged + (side - 1) * pictures) // side
    return max(1, min(total, pictures * ((frame // merged + side - 1) // side)))


def vision_inputs(
    pictures: Sequence[Picture],
    config: VisionConfig,
    *,
    patches: int | None = None,
    pictures_bucket: int | None = None,
    frame: int | None = None,
    windows: int | None = None,
) -> VisionInputs:
    """All patches one after another with the plan of their windows and frames, in numpy.

    Shapes depend on the buckets alone: P = patches; F = pictures_bucket (temporal frames);
    Lf = frame, patches of the largest frame; W = windows; Lw = min(patches of a whole window, Lf).
    Each of them defaults to the next step of a ladder over what is there (windows: to the most
    that the other three allow, see `most_windows`). Full attention costs F * Lf^2: encode
    pictures of very different sizes in separate calls.

    Raises:
        ValueError: pictures that do not fit a bucket.
    """
    merge, merged = config.merge_size, config.merge_size**2
    for picture in pictures:
        t, h, w = picture.grid
        if h % merge or w % merge:
            raise ValueError(f"grid {picture.grid} does not divide into blocks of side {merge}")
        if picture.patches.shape[1] != config.patch_dim:
            raise ValueError(
                f"patches of {picture.patches.shape[1]} numbers, config says {config.patch_dim}"
            )
    total = sum(len(picture.patches) for picture in pictures)
    frames = sum(picture.grid[0] for picture in pictures)
    largest = max((picture.grid[1] * picture.grid[2] for picture in pictures), default=merged)
    patches = ladder(total) if patches is None else patches
    pictures_bucket = ladder(frames, 4, multiple=4) if pictures_bucket is None else pictures_bucket
    frame = ladder(largest, 16) if frame is None else frame
    if windows is None:
        windows = most_windows(patches, pictures_bucket, frame, config)
    if patches % merged:
        raise ValueError(f"a bucket of {patches} patches is not a multiple of {merged}")
    _fits("patches", total, patches)
    _fits("frames (pictures_bucket)", frames, pictures_bucket)
    _fits("patches in one frame", largest, frame)

    pixels = np.zeros((patches, config.patch_dim), np.float32)
    hw = np.zeros((patches, 2), np.int32)
    frame_of = np.zeros(total, np.int64)
    window_of = np.zeros(total, np.int64)
    at, frame_at, window_at = 0, 0, 0
    for picture in pictures:
        t, h, w = picture.grid
        here = slice(at, at + t * h * w)
        pixels[here] = picture.patches
        rows, columns = _block_order(h, w, merge)
        hw[here] = np.tile(np.stack([rows, columns], axis=1), (t, 1))
        side = config.window_tokens * merge
        across = -(-w // side)
        window = rows // side * across + columns // side
        per_frame = -(-h // side) * across
        step = np.arange(t)[:, None]
        frame_of[here] = np.repeat(frame_at + np.arange(t), h * w)
        window_of[here] = (window_at + step * per_frame + window).reshape(-1)
        at, frame_at, window_at = here.stop, frame_at + t, window_at + t * per_frame
    _fits("windows", window_at, windows)

    width = min((config.window_tokens * merge) ** 2, frame)
    window_groups, window_slot = _groups(window_of, windows, width, patches)
    frame_groups, frame_slot = _groups(frame_of, pictures_bucket, frame, patches)
    return VisionInputs(pixels, hw, window_groups, frame_groups, window_slot, frame_slot)


def _fits(what: str, count: int, bucket: int) -> None:
    if count > bucket:
        raise ValueError(f"{count} {what} do not fit a bucket of {bucket}")


def _block_order(h: int, w: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [h*w] of patches in the order of merge x merge blocks."""
    grid = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
    rows, columns = grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return rows, columns


def _groups(group_of: np.ndarray, count: int, width: int, patches: int):
    """Members [count, width] of each group (padding: `patches`) and the slot [patches] of each."""
    order = np.argsort(group_of, kind="stable")
    sizes = np.bincount(group_of, minlength=count)
    starts = np.cumsum(sizes) - sizes
    slot_sorted = group_of[order] * width + np.arange(len(order)) - starts[group_of[order]]
    members = np.full(count * width, patches, np.int32)
    members[slot_sorted] = order
    slot = np.full(patches, count * width, np.int32)
    slot[order] = slot_sorted
    return members.reshape(count, width), slot
