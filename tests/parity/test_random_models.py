"""Random models, random conversations: ours against the original, from pixels to tokens.

Likely mistakes of a port, and the test here or elsewhere that turns red:

 1 positions that count a picture's tokens, not its longer side      test_positions_and_deltas...
 2 decoding by cache slot, or without delta                          test_greedy_tokens...
 3 M-RoPE sections interleaved or in another order                   test_logits...
 4 window order not applied to angles, or undone in the wrong place  test_picture_features...
 5 attention across pictures, or windows of two mixed up             test_picture_features...
 6 patches in raster order, channels and frames swapped              test_patches...
 7 tanh GELU, LayerNorm, another epsilon                             test_picture_features...
 8 biases missing or too many                                        test_gradients...,
     strict names: test_parity.py, test_errors_name_every_tensor
 9 angles of the wrong precision in bfloat16                         test_parity.py, bfloat16
10 transposed kernels                                                test_logits...
11 a tied head lost, or its gradient from one use only               test_gradients...
12 rounding of sizes, alpha, limits of pixels                        test_patches...;
     any size and mode: tests/inputs/test_images.py
13 features at the wrong tokens, padding that leaks                  test_hidden_states...;
     tests/model/test_forward.py, test_padding_patches...
14 programs compiled anew                                            test_recompiles.py
15 names of an export                                                test_parity.py, export

The default run takes a few models; `python -m pytest -m slow tests/parity` takes the other 54.
"""

import gc

import compare
import numpy as np
import originals
import pytest
import torch

from mmsr_jax.inputs import layout

SOME = range(6)  # in every run: tied and not
MANY = range(6, 60)  # python -m pytest -m slow tests/parity
SEEDS = [*SOME, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)]
TIE = 1e-5  # logits nearer than this may be taken in either order


@pytest.fixture(scope="module", params=SEEDS)
def case(request, tiny, tmp_path_factory):
    yield compare.Case(request.param, tmp_path_factory.mktemp("case"), tiny.tokenizer)
    gc.collect()


def furthest(ours, theirs) -> float:
    """Largest difference of any number."""
    pairs = zip(ours, theirs, strict=True)
    assert all(a.shape == b.shape and a.size for a, b in pairs)
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def test_patches_are_equal_to_the_bit(case):
    pictures = [picture for tokens, _ in case.rows for picture in tokens.pictures]
    expected = case.arguments["pixel_values"].numpy()
    np.testing.assert_array_equal(np.concatenate([p.patches for p in pictures]), expected)
    assert [p.grid for p in pictures] == [
        tuple(grid) for grid in case.arguments["image_grid_thw"].tolist()
    ]


def test_positions_and_deltas_are_equal(case):
    where, deltas = originals.positions(case.model, case.arguments)
    theirs = case.theirs(where.transpose(1, 2, 0))
    packed = case.ours(case.batch.inputs.positions.transpose(1, 2, 0))
    for row, (tokens, _) in enumerate(case.rows):
        grids = [picture.grid for picture in tokens.pictures]
        planned, delta = layout.positions(tokens.ids, grids, case.config)
        assert delta == deltas[row] == tokens.next_position - len(tokens)
        for ours in (planned.T, tokens.positions.T, packed[row]):
            np.testing.assert_array_equal(ours, theirs[row])


def test_picture_features_are_equal_after_every_layer(case, figure):
    depth = case.config.vision.depth
    for count in range(depth + 1):
        features = case.first_layers("vision", count)[0]
        with originals.first_layers(case.model.model.visual, "blocks", count):
            expected = originals.features(case.model, case.arguments)
        assert expected.std() > 0.1
        assert figure("features", furthest([case.shown(features)], [expected])) < 1e-5, count


def test_hidden_states_are_equal_after_every_layer(case, figure):
    expected = originals.hidden_layers(case.model, case.arguments)
    assert len(expected) == case.config.text.layers
    for count, layer in enumerate(expected, start=1):
        hidden = case.first_layers("text", count)[1]
        gap = figure("layers", furthest(case.ours(hidden), case.theirs(layer)))
        assert gap < 2e-5, f"layer {count}"


def test_logits_are_equal(case, figure):
    originals.forget(case.model)
    with torch.no_grad():
        expected = case.model(**case.arguments).logits.numpy()
    assert expected.std() > 0.5
    gap = figure("logits", furthest(case.ours(case.output[2]), case.theirs(expected)))
    assert gap < 2e-5


def test_gradients_are_equal_for_every_parameter(case, figure):
    ours, theirs = (dict(compare.leaves(tree)) for tree in case.gradients())
    assert ours.keys() == theirs.keys()
    assert ("text.head.kernel" in ours) != case.config.text.tied
    for name, expected in theirs.items():
        scale = np.abs(expected).max()
        assert scale > 0, f"nothing flows to {name}"
        gap = figure("gradient (relative)", np.abs(ours[name] - expected).max() / scale)
        assert gap < 1e-4, name


def test_greedy_tokens_are_equal_before_and_after_a_tool_speaks(case, figure):
    first, second = case.continued(64, 16)
    ties = 0
    for count, rows in ((64, first), (16, second)):
        for ours, theirs, lead in rows:
            assert ours.shape == theirs.shape == (count,)
            different = np.flatnonzero(ours != theirs)
            if different.size and lead[different[0]] < TIE:
                ties += 1  # what follows a different choice cannot be compared
                continue
            assert not different.size, f"token {different[0]}, lead {lead[different[0]]:.1e}"
    assert figure("ties of greedy tokens", ties) == 0
