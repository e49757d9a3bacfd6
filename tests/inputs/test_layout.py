"""Host plans: rotary positions, window and frame groups, buckets."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsr_jax.inputs import layout
from mmsr_jax.inputs.pad import ladder
from mmsr_jax.model.config import preset
from mmsr_jax.types import Picture

CONFIG = preset("tiny")
IMAGE = CONFIG.image_token_id


def picture(h, w, t=1, dim=CONFIG.vision.patch_dim):
    return Picture(np.ones((t * h * w, dim), np.float32), (t, h, w))


def test_positions_of_the_written_example():
    # qwen25vl.md 1.3: text, a 4x6 picture, text, a 4x4 picture, text
    ids = np.asarray([1, 2, 3] + [IMAGE] * 6 + [4, 5, 6, 7] + [IMAGE] * 4 + [8, 9])
    got, delta = layout.positions(ids, [(1, 4, 6), (1, 4, 4)], CONFIG)
    assert got.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9, 10, 10, 10, 10, 12, 13],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9, 10, 10, 11, 11, 12, 13],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10, 11, 10, 11, 12, 13],
    ]
    assert delta == -5 and got.dtype == np.int32


def test_text_alone_counts_up_and_pictures_may_touch():
    got, delta = layout.positions(np.arange(20, 25), [], CONFIG)
    assert got.tolist() == [list(range(5))] * 3 and delta == 0
    got, delta = layout.positions(np.asarray([IMAGE] * 2), [(1, 2, 2), (1, 2, 2)], CONFIG)
    assert got.tolist() == [[0, 1]] * 3 and delta == 0


def test_a_picture_advances_by_its_longer_side():
    positions, after = layout.picture_positions((1, 4, 10), 7, 2)
    assert positions.shape == (3, 10) and after == 12
    assert positions[:, -1].tolist() == [7, 8, 11]


@pytest.mark.parametrize(
    "ids, grids, words",
    [
        ([IMAGE] * 5, [(1, 4, 6)], "5 image tokens, but 1 pictures need 6"),
        ([1, IMAGE], [], "1 image tokens, but 0 pictures need 0"),
        ([IMAGE, 1] + [IMAGE] * 5, [(1, 4, 6)], "not a whole run of 6"),
    ],
)
def test_positions_refuse_what_does_not_agree(ids, grids, words):
    with pytest.raises(ValueError, match=words):
        layout.positions(np.asarray(ids), grids, CONFIG)


sides = st.integers(1, 9).map(lambda n: 2 * n)
grids = st.lists(st.tuples(st.integers(1, 2), sides, sides), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(grids)
def test_groups_hold_every_patch_once_and_undo(grids):
    config = dataclasses.replace(CONFIG.vision, patch_size=2, window_size=16)
    pictures = [picture(h, w, t, dim=config.patch_dim) for t, h, w in grids]
    plan = layout.vision_inputs(pictures, config)
    total = sum(len(p.patches) for p in pictures)
    patches = plan.patches.shape[0]
    assert plan.frames.shape[1] == ladder(max(h * w for _, h, w in grids), 16)
    assert plan.windows.shape[1] == min(64, plan.frames.shape[1])
    frame_of = np.repeat(
        np.arange(sum(t for t, _, _ in grids)), [h * w for t, h, w in grids for _ in range(t)]
    )
    for groups, slot in ((plan.windows, plan.window_slot), (plan.frames, plan.frame_slot)):
        assert sorted(groups[groups < patches].tolist()) == list(range(total))
        assert (groups.reshape(-1)[slot[:total]] == np.arange(total)).all()
        assert (slot[total:] == groups.size).all() and (groups <= patches).all()
        for group in groups:
            members = group[group < patches]
            assert len(set(frame_of[members])) <= 1  # never across frames or pictures
    for group in plan.windows:
        members = group[group < patches]
        if len(members):
            corner = plan.hw[members] // 8
            assert (corner == corner[0]).all()
    # All patches of one window and frame are together, not split over two groups.
    keys = np.concatenate([frame_of[:, None], plan.hw[:total] // 8], axis=1)
    assert len(np.unique(keys, axis=0)) == sum((g < patches).any() for g in plan.windows)


def test_patches_stand_in_blocks():
    plan = layout.vision_inputs([picture(4, 6)], CONFIG.vision)
    assert plan.hw[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert plan.hw[12:14].tolist() == [[2, 0], [2, 1]]


def test_shapes_depend_on_buckets_alone():
    sizes = {"patches": 160, "pictures_bucket": 6, "frame": 64}
    one = layout.vision_inputs([picture(4, 6)], CONFIG.vision, **sizes)
    many = layout.vision_inputs(
        [picture(2, 32), picture(8, 8), picture(4, 6)], CONFIG.vision, **sizes
    )
    none = layout.vision_inputs([], CONFIG.vision, **sizes)
    for name in ("patches", "hw", "windows", "frames", "window_slot", "frame_slot"):
        shapes = {getattr(plan, name).shape for plan in (one, many, none)}
        assert len(shapes) == 1, name
        assert len({getattr(plan, name).dtype for plan in (one, many, none)}) == 1
    assert one.windows.shape == (layout.most_windows(160, 6, 64, CONFIG.vision), 64)
    small = layout.vision_inputs([picture(4, 6)], CONFIG.vision, patches=96, frame=24, windows=4)
    assert small.windows.shape == (4, 24) and small.frames.shape == (4, 24)


def test_most_windows_is_never_exceeded():
    # A strip one merged token high has the most windows for its patches.
    for columns in range(1, 40):
        config, h, w = CONFIG.vision, 2, 2 * columns
        need = -(-columns // config.window_tokens)
        assert need <= layout.most_windows(h * w, 1, h * w, config)
    square = layout.vision_inputs([picture(14, 10)] * 3, CONFIG.vision, patches=420, frame=140)
    assert (square.windows < 420).any(axis=1).sum() == 12


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"patches": 64}, "84 patches do not fit a bucket of 64"),
        ({"pictures_bucket": 1}, "2 frames .* do not fit a bucket of 1"),
        ({"frame": 24}, "60 patches in one frame do not fit a bucket of 24"),
        ({"windows": 2}, "3 windows do not fit a bucket of 2"),
        ({"patches": 90}, "90 patches is not a multiple of 4"),
    ],
)
def test_what_does_not_fit_a_bucket_is_named(sizes, words):
    with pytest.raises(ValueError, match=words):
        layout.vision_inputs([picture(4, 6), picture(10, 6)], CONFIG.vision, **sizes)


def test_patches_of_another_size_are_refused():
    with pytest.raises(ValueError, match="12 numbers, config says 1176"):
        layout.vision_inputs([picture(4, 6, dim=12)], CONFIG.vision)


def test_ladder_rises_by_its_growth_and_holds_n():
    steps = sorted({ladder(n) for n in range(2000)})
    assert steps[:5] == [64, 96, 144, 216, 328]
    for n in range(1, 2000, 7):
        assert n <= ladder(n) and (n <= 64 or ladder(n) <= 1.5 * n + 8)
    assert ladder(5, minimum=1, growth=2, multiple=1) == 8
    with pytest.raises(ValueError):
        ladder(-1)
    with pytest.raises(ValueError):
        ladder(5, growth=1)
