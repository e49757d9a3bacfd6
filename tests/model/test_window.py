"""Decoding in a window on the pages: as from the pages themselves, whoever sits beside a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model import window
from mmsr_jax.model.cache import Cache, pool_shape
from mmsr_jax.model.config import preset

CONFIG = dataclasses.replace(
    preset("tiny"), text=dataclasses.replace(preset("tiny").text, layers=2)
)
PAGE, TABLE, ROWS, STEPS = 8, 6, 4, 5


@pytest.fixture(scope="module")
def model():
    graph, _ = qwen.abstract(CONFIG)
    return graph, qwen.unstack(qwen.init(CONFIG, jax.random.key(0)), 3)


@pytest.fixture
def cache():
    """Rows of 0, 7, 30 and 43 tokens; the last two share their first page. The rest is nonsense."""
    rng = np.random.default_rng(0)
    pages = ROWS * TABLE + 2
    tables = rng.permutation(pages)[: ROWS * TABLE].reshape(ROWS, TABLE).astype(np.int32)
    tables[3, 0] = tables[2, 0]
    lengths = np.asarray([0, 7, 30, 43], np.int32)
    kv = np.full(pool_shape(2 * pages, PAGE, 2, 32, True), np.nan, np.float32)
    for row, length in enumerate(lengths):
        for page in tables[row, : -(-length // PAGE)]:
            for layer in range(2):
                kv[layer * pages + page] = rng.normal(size=kv.shape[1:])
        if length % PAGE and length:  # behind a row's last token: somebody else's infinities
            for layer in range(2):
                kv[layer * pages + tables[row, length // PAGE], :, :, length % PAGE :] = np.inf
    return Cache(jnp.asarray(kv), jnp.asarray(tables), jnp.asarray(lengths))


def tokens(step, lengths, active):
    rows = len(lengths)
    ids = np.random.default_rng(step).integers(20, 500, (ROWS, 1))[:rows].astype(np.int32)
    where = np.broadcast_to(np.asarray(lengths)[None, :, None], (3, rows, 1)).astype(np.int32)
    segments = np.asarray(active, np.int32)[:, None]
    return qwen.Inputs(ids, where, segments, np.full((rows, 1), -1, np.int32))


def decode(model, cache, steps):
    """Hidden states [steps, B, D] of tokens that are added; row b rests after 2 + b of them."""
    run, hidden, lengths = jax.jit(functools.partial(qwen.forward, model[0])), [], cache.lengths
    for step in range(steps):
        active = step < 2 + np.arange(len(lengths))
        out = run(model[1], tokens(step, lengths, active), cache)
        cache, lengths = out.cache, out.cache.lengths
        hidden.append(np.where(active[:, None], out.hidden[:, 0], 0))
    return np.stack(hidden), cache


def opened(cache, most, fresh=(True,) * ROWS, layers=None):
    layers = layers or window.empty(cache.kv, 2, ROWS, TABLE)
    return jax.jit(window.load, static_argnums=3)(layers, cache, jnp.asarray(fresh), most)


@pytest.mark.parametrize("slots", [512, 16])  # one block, and three
def test_a_window_is_the_pages(model, cache, slots, monkeypatch):
    monkeypatch.setattr(window, "SLOTS", slots)
    clean = dataclasses.replace(cache, kv=jnp.nan_to_num(cache.kv, posinf=0))
    wanted, pool = decode(model, clean, STEPS)
    begun = opened(cache, STEPS)
    assert len(begun.layers[0].keys) == (1 if slots == 512 else 3)
    found, closed = decode(model, begun, STEPS)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(closed.lengths, pool.lengths)
    counts = jnp.minimum(2 + jnp.arange(ROWS), STEPS)
    kv = window.scatter(clean, closed, counts)
    np.testing.assert_allclose(kv, pool.kv, atol=1e-5)
    # Nothing but the new tokens has changed, to the bit.
    changed = np.asarray(kv != clean.kv).any((1, 2, 4))
    assert changed.sum() == 2 * counts.sum()


@pytest.mark.parametrize("slots", [512, 16])
def test_a_row_is_the_same_whoever_sits_beside_it(model, cache, slots, monkeypatch):
    """The longest row decides how many blocks are read, and of how many rows products are."""
    monkeypatch.setattr(window, "SLOTS", slots)
    found, _ = decode(model, opened(cache, STEPS), STEPS)
    resting = dataclasses.replace(cache, lengths=cache.lengths.at[3].set(0))
    alone, _ = decode(model, opened(resting, STEPS), STEPS)
    np.testing.assert_array_equal(alone[:, :3], found[:, :3])


def test_rows_that_stay_are_not_read_again(model, cache):
    """A look ends and the next begins: two rows stay, the others are taken by somebody else."""
    whole, _ = decode(model, opened(cache, STEPS), STEPS)
    _, closed = decode(model, opened(cache, 2), 2)
    pool = window.scatter(cache, closed, jnp.full(ROWS, 2))
    fresh = np.asarray([True, False, True, False])
    # Row 0 takes up where row 1 stands; the pages of those that stay are not there any more.
    tables = cache.tables.at[0].set(cache.tables[1])
    kept = np.concatenate([cache.tables[1, 2:], cache.tables[3, 1:]])
    half = pool.shape[0] // 2
    spoilt = pool.at[np.concatenate([kept, half + kept])].set(np.nan)
    then = Cache(spoilt, tables, closed.lengths.at[0].set(closed.lengths[1]))
    again = opened(then, 1, fresh, closed.layers)
    out = jax.jit(functools.partial(qwen.forward, model[0]))(
        model[1], tokens(2, again.lengths, np.ones(ROWS)), again
    )
    for row in (2, 3):  # which had not ended by then
        np.testing.assert_array_equal(out.hidden[row, 0], whole[2, row])


def test_a_window_in_bfloat16_is_the_pages(cache):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = qwen.abstract(config)[0], qwen.unstack(qwen.init(CONFIG, jax.random.key(0)))
    kv = jnp.nan_to_num(cache.kv, posinf=0).astype("bfloat16")
    cache = dataclasses.replace(cache, kv=kv)
    wanted, _ = decode(model, cache, STEPS)
    begun = opened(cache, STEPS)
    assert begun.added[0].dtype == begun.layers[0].keys[0].dtype == "bfloat16"
    found, _ = decode(model, begun, STEPS)
    scale = np.abs(wanted.astype("f")).max()
    np.testing.assert_allclose(found.astype("f"), wanted.astype("f"), atol=0.02 * scale)


@pytest.mark.parametrize("page, table, blocks", [(1024, 1, 1), (300, 3, 3), (32, 17, 2), (8, 1, 1)])
def test_blocks_hold_a_row_and_little_more(page, table, blocks):
    pool = jax.ShapeDtypeStruct((table, 2, 1, page, 4), np.float32)
    (layer,) = window.empty(pool, 1, 2, table)
    slots = sum(values.shape[2] for values in layer.values)
    assert len(layer.values) == blocks and 0 <= slots - table * page < blocks * page
    assert all(v.shape[2] <= max(window.SLOTS, page) for v in layer.values)


def test_a_window_needs_layers_apart(cache):
    graph, shapes = qwen.abstract(CONFIG)
    inputs = tokens(0, cache.lengths, np.ones(ROWS))
    with pytest.raises(ValueError, match="apart"):
        jax.eval_shape(functools.partial(qwen.forward, graph), shapes, inputs, opened(cache, 1))


def test_a_cut_table_is_the_table(model):
    """Embedding and logits of a table in parts, of which the last is shorter."""
    graph, cut = model
    whole = qwen.unstack(qwen.init(CONFIG, jax.random.key(0)))
    parts = cut["text"]["embed"]["table"]
    assert [len(part) for part in parts] == [171, 171, 170]
    assert qwen.unstack(cut, 3)["text"]["embed"] is cut["text"]["embed"]
    ids = np.asarray([[-3, 0, 170, 171, 341, 342, 511, 600]], np.int32)
    inputs = qwen.Inputs(
        ids, np.zeros((3, 1, 8), np.int32), np.ones_like(ids), np.full_like(ids, -1)
    )
    run = jax.jit(functools.partial(qwen.forward, graph))
    np.testing.assert_allclose(
        run(cut, inputs).logits, run(whole, inputs).logits, atol=1e-6, rtol=1e-6
    )


def test_a_small_table_for_many_cores():
    """No part is empty: nothing can be looked up in that."""
    few = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=5))
    graph, whole = qwen.abstract(few)[0], qwen.init(few, jax.random.key(0))
    cut = qwen.unstack(whole, 64)
    assert [len(part) for part in cut["text"]["embed"]["table"]] == [1] * 5
    ids = np.asarray([[0, 4, 2]], np.int32)
    inputs = qwen.Inputs(ids, np.zeros((3, 1, 3), np.int32), np.ones_like(ids), ids * 0 - 1)
    run = jax.jit(functools.partial(qwen.forward, graph))
    found, wanted = (run(params, inputs).logits for params in (cut, qwen.unstack(whole)))
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6)


def test_a_table_that_is_no_head_stays_whole():
    """Parts are for the logits; they would cost a second table."""
    untied = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tied=False))
    graph, whole = qwen.abstract(untied)[0], qwen.init(untied, jax.random.key(0))
    apart = qwen.unstack(whole, 3)
    assert apart["text"]["embed"] is whole["text"]["embed"]
    assert apart["text"]["head"] is whole["text"]["head"]
    ids = np.asarray([[3, 511, 170]], np.int32)
    inputs = qwen.Inputs(ids, np.zeros((3, 1, 3), np.int32), np.ones_like(ids), ids * 0 - 1)
    run = jax.jit(functools.partial(qwen.forward, graph))
    found, wanted = (run(params, inputs).logits for params in (apart, whole))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
