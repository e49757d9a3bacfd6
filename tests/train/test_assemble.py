"""Packing changes where tokens stand, never what is learned from them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsr_jax.train import grpo, step
from mmsr_jax.train.assemble import PackConfig, Piece, assemble
from mmsr_jax.types import Author

LOSS = grpo.LossConfig(kl_weight=0.1)


def unpack(batches):
    """Each conversation of the batches as a dict of its entries; padding is checked."""
    found = []
    for batch in batches:
        inputs = batch.inputs
        for row in range(inputs.ids.shape[0]):
            segments = inputs.segments[row]
            used = int((segments > 0).sum())
            assert (segments[:used] > 0).all()  # padding comes last
            assert batch.mask[row, used:].sum() == 0 and batch.weights[row, used:].sum() == 0
            for number in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == number)
                assert (np.diff(at) == 1).all()
                found.append(
                    dict(
                        ids=inputs.ids[row, at],
                        positions=inputs.positions[:, row, at],
                        index=inputs.image_index[row, at],
                        patches=inputs.vision.patches,
                        **{
                            name: getattr(batch, name)[row, at]
                            for name in (
                                "targets", "mask", "weights", "advantages", "sampler_logprobs",
                            )
                        },
                    )
                )  # fmt: skip
    return found


def pixels(tokens):
    """The patches of each picture token, in the order of the conversation: [n, 4, patch_dim]."""
    if not tokens.pictures:
        return np.zeros((0, 4, 1176), np.float32)
    return np.concatenate([p.patches.reshape(-1, 4, 1176) for p in tokens.pictures])


@pytest.mark.parametrize("rows", [1, 4])
def test_every_conversation_is_there_once_and_whole(tiny, pieces, rows):
    config = dataclasses.replace(tiny.pack, rows=rows)
    batches = assemble(pieces, tiny.model, config, aggregate="token", pad_id=7)
    assert len({b.inputs.ids.shape for b in batches}) == 1
    assert len({b.inputs.vision.windows.shape for b in batches}) == 1
    found = {tuple(f["ids"]): f for f in unpack(batches)}
    assert len(found) == len(pieces)
    for piece in pieces:
        tokens, f = piece.tokens, found[tuple(piece.tokens.ids)]
        np.testing.assert_array_equal(f["positions"], tokens.positions)
        own = tokens.image_index >= 0
        np.testing.assert_array_equal(f["index"] >= 0, own)
        shown = f["patches"].reshape(-1, 4, 1176)[f["index"][own]]
        np.testing.assert_array_equal(shown, pixels(tokens))
        # Entry t speaks of token t + 1.
        is_model = tokens.authors[1:] == Author.MODEL
        np.testing.assert_array_equal(f["mask"][:-1], is_model)
        np.testing.assert_array_equal(f["targets"][:-1], tokens.ids[1:])
        np.testing.assert_array_equal(f["sampler_logprobs"][:-1], tokens.logprobs[1:] * is_model)
        np.testing.assert_array_equal(f["advantages"][:-1], piece.advantage * is_model)
        np.testing.assert_array_equal(f["weights"][:-1] > 0, is_model)
        for name in ("mask", "weights", "advantages", "sampler_logprobs"):
            assert f[name][-1] == 0  # the last token predicts nothing


def test_equal_pictures_are_encoded_once(tiny, pieces):
    (batch,) = assemble(
        pieces, tiny.model, dataclasses.replace(tiny.pack, rows=9), aggregate="token"
    )
    distinct = {p.digest for piece in pieces for p in piece.tokens.pictures}
    assert len(distinct) == 4 and sum(len(p.tokens.pictures) for p in pieces) > 8
    used = (batch.inputs.vision.patches != 0).any(-1).sum()
    assert used == 60 + 24 + 8 + 8


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_weights_sum_to_one(tiny, pieces, aggregate):
    narrow = dataclasses.replace(tiny.pack, rows=1)
    batches = assemble(pieces, tiny.model, narrow, aggregate=aggregate)
    assert len(batches) > 1
    assert sum(b.weights.sum(dtype=np.float64) for b in batches) == pytest.approx(1, abs=1e-6)
    found = {tuple(f["ids"]): f["weights"] for f in unpack(batches)}
    given = np.array([p.weight for p in pieces])
    counts = np.array([(p.tokens.authors == Author.MODEL).sum() for p in pieces])
    share = given * counts if aggregate == "token" else given
    for piece, expected in zip(pieces, share / share.sum(), strict=True):
        weights = found[tuple(piece.tokens.ids)]
        assert weights.sum(dtype=np.float64) == pytest.approx(expected, rel=1e-5)
        assert len(set(weights[weights > 0].tolist())) == 1  # alike within a conversation


def test_conversations_without_weight_or_words_teach_nothing(tiny):
    silent = Piece(tiny.prompt("What?"))
    muted = Piece(tiny.conversation(("What?",), seed=1), weight=0.0)
    (batch,) = assemble([silent, muted], tiny.model, tiny.pack, aggregate="sequence")
    assert batch.weights.sum() == 0
    spoken = Piece(tiny.conversation(("What?",), seed=2))
    (batch,) = assemble([silent, muted, spoken], tiny.model, tiny.pack, aggregate="token")
    assert batch.weights.sum() == pytest.approx(1)


def gradients(tiny, params, pieces, pack, kind, **fields):
    """Loss and gradient of one step, micro-batch by micro-batch."""
    aggregate = fields.pop("aggregate", "token")
    grads, measured = step.zeros_like(params), None
    batches = assemble(pieces, tiny.model, pack, aggregate=aggregate)
    for batch in batches:
        if kind == "sft":
            grads, new = step.accumulate_sft(tiny.graph, params, grads, batch)
        else:
            grads, new = step.accumulate_grpo(
                tiny.graph, params, fields["reference"], grads, batch, LOSS, np.float32(1)
            )
        measured = step.add(measured, new)
    return grads, measured, len(batches)


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_loss_of_packed_rows_equals_that_of_each_conversation_alone(
    tiny, params, pieces, alone, aggregate
):
    _, measured, _ = gradients(tiny, params, pieces, tiny.pack, "sft", aggregate=aggregate)
    expected, weights, tokens, total = 0.0, 0.0, 0, 0.0
    for piece in pieces:
        own = piece.tokens.authors == Author.MODEL
        nll = -alone(params, piece.tokens)[0][own]
        share = piece.weight * (1 / own.sum() if aggregate == "sequence" else 1)
        expected, weights = expected + share * nll.sum(), weights + share * own.sum()
        tokens, total = tokens + own.sum(), total + nll.sum()
    assert float(measured["loss"]) == pytest.approx(expected / weights, rel=1e-5)
    assert float(measured["tokens"]) == tokens
    assert float(measured["nll_sum"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_how_a_step_is_cut_does_not_change_it(tiny, params, pieces, close_trees, kind):
    """Conversations of no weight that fill three rows of four force the others apart."""
    fields = {"reference": tiny.params(1)} if kind == "grpo" else {}
    room = tiny.pack.length - len(tiny.conversation(("",)))
    fillers = [Piece(tiny.conversation(("?" * room,), seed=n), weight=0.0) for n in range(9)]
    assert {len(f.tokens) for f in fillers} == {tiny.pack.length}
    whole, left, few = gradients(tiny, params, pieces, tiny.pack, kind, **fields)
    scattered = [*fillers, *pieces[::-1]]
    parts, right, many = gradients(tiny, params, scattered, tiny.pack, kind, **fields)
    assert few == 1 and many >= 3
    for name in left:
        if name not in ("tokens", "nll_sum") and "_max" not in name:
            assert float(left[name]) == pytest.approx(float(right[name]), rel=2e-5, abs=1e-6), name
    close_trees(parts, whole, 2e-5)


def test_neighbours_in_a_row_do_not_see_one_another(tiny, params, pieces):
    """Other words in the neighbours leave a conversation's log-probs as they are."""
    first = pieces[4]
    for other in (pieces[1], pieces[2]):
        (batch,) = assemble([first, other], tiny.model, tiny.pack, aggregate="token")
        assert batch.inputs.segments[0].max() == 2
        scored = step.logprobs(tiny.graph, params, batch, np.float32(1))
        n = len(first.tokens) - 1
        if other is pieces[1]:
            base = np.asarray(scored[0, :n])
    np.testing.assert_allclose(scored[0, :n], base, atol=1e-5)


def test_what_does_not_fit_is_refused_with_its_numbers(tiny):
    def refused(tokens, message, **fields):
        config = dataclasses.replace(tiny.pack, **fields)
        with pytest.raises(ValueError, match=message):
            assemble([Piece(tokens)], tiny.model, config, aggregate="token")

    tokens = tiny.conversation((tiny.picture(6, 10), tiny.picture(4, 6)), seed=1)
    refused(tokens, rf"of {len(tokens)} tokens and 2 pictures.* rows of 30 tokens", length=30)
    refused(tokens, "2 pictures does not fit .* 1 pictures of at most", pictures=1)
    refused(tokens, "at most 24 patches", picture_patches=24)
    refused(tokens, "80 in all", patches=80)
    one = dataclasses.replace(tokens, pictures=tokens.pictures[:1])
    refused(one, "more image placeholders than images: .* row 20 .* 1 pictures have 15 rows")
    with pytest.raises(ValueError, match="nothing to train on"):
        assemble([], tiny.model, tiny.pack, aggregate="token")
    with pytest.raises(ValueError, match="'token' or 'sequence', got 'mean'"):
        assemble([Piece(tokens)], tiny.model, tiny.pack, aggregate="mean")


def test_short_conversations_fill_the_gaps_of_long_ones(tiny):
    talks = [tiny.conversation(("What? " * n,), seed=n, length=3) for n in (40, 1, 38, 2, 1, 30)]
    pack = dataclasses.replace(tiny.pack, rows=2)
    batches = assemble([Piece(t) for t in talks], tiny.model, pack, aggregate="token")
    assert len(batches) == 2
    assert (batches[0].inputs.segments.max(1) > 1).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=8))
def test_any_conversations_are_packed_whole(tiny, shapes):
    rng = np.random.default_rng(len(shapes))
    pictures = [tiny.picture(2, 4), tiny.picture(4, 4), tiny.picture(6, 10)]
    talks = [
        tiny.conversation((*pictures[:count], "What?"), seed=int(rng.integers(1 << 30)), length=n)
        for n, count in shapes
    ]
    pack = PackConfig(rows=2, length=80, patches=96, pictures=3, picture_patches=64)
    batches = assemble([Piece(t) for t in talks], tiny.model, pack, aggregate="sequence")
    found = sorted(f["ids"].tolist() for f in unpack(batches))
    assert found == sorted(t.ids.tolist() for t in talks)
    assert sum(b.weights.sum(dtype=np.float64) for b in batches) == pytest.approx(1, abs=1e-5)
