"""The model against itself: cached, packed, padded and separate runs agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.attention import attend, attend_cached, xla
from mmsr_jax.model.cache import copy_pages, heads_first
from mmsr_jax.model.config import preset
from mmsr_jax.model.qwen2_5_vl import Inputs
from mmsr_jax.types import Picture

TINY = preset("tiny")
CONFIG = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, layers=2, vocab_size=64),
    vision=dataclasses.replace(TINY.vision, depth=2, full_attention_layers=(1,)),
)
IMAGE = CONFIG.image_token_id
GRIDS = [(1, 4, 6), (1, 10, 6), (1, 2, 2)]
SLOTS = 80  # blocks of cached attention: two and a half


@pytest.fixture(scope="module")
def model():
    graph, _ = qwen2_5_vl.abstract(CONFIG)
    params = qwen2_5_vl.init(CONFIG, jax.random.key(1))
    rng = np.random.default_rng(2)

    def perturb(leaf):  # biases and norms away from 0 and 1
        return leaf + (0.1 * rng.normal(size=leaf.shape)).astype("f")

    return graph, jax.tree.map(perturb, params)


forward = jax.jit(qwen2_5_vl.forward, static_argnums=0)
encode = jax.jit(qwen2_5_vl.encode_images, static_argnums=0)


@functools.cache
def pictures():
    rng = np.random.default_rng(5)
    return [Picture(rng.normal(size=(t * h * w, 1176)).astype("f"), (t, h, w)) for t, h, w in GRIDS]


def row(rng, text, members):
    """Tokens, positions and image rows of `text` tokens with pictures between them."""
    first = np.cumsum([0] + [len(p.patches) // 4 for p in pictures()])
    ids, index = [], []
    for member in members:
        count = len(pictures()[member].patches) // 4
        ids += [*rng.integers(20, 64, 3), *[IMAGE] * count]
        index += [-1] * 3 + list(range(first[member], first[member + 1]))
    ids += list(rng.integers(20, 64, text))
    index += [-1] * text
    ids = np.asarray(ids, np.int32)
    where, _ = layout.positions(ids, [GRIDS[m] for m in members], CONFIG)
    return ids, where, np.asarray(index, np.int32)


def batch(rows, length, segments=None):
    """Rows [(ids, positions, image_index)] padded on the right."""
    shape = (len(rows), length)
    ids, where = np.zeros(shape, np.int32), np.zeros((3, *shape), np.int32)
    index, valid = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    for number, (tokens, positions, images) in enumerate(rows):
        count = len(tokens)
        ids[number, :count], where[:, number, :count] = tokens, positions
        index[number, :count], valid[number, :count] = images, 1
    return Inputs(ids, where, valid if segments is None else segments, index)


def part(rows, starts, stops):
    return [
        (ids[a:b], where[:, a:b], index[a:b])
        for (ids, where, index), a, b in zip(rows, starts, stops, strict=True)
    ]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    return [row(rng, 12, (0, 1)), row(rng, 31, ()), row(rng, 9, (2,))]


@pytest.fixture(scope="module")
def features(model):
    graph, params = model
    return encode(graph, params, layout.vision_inputs(pictures(), CONFIG.vision))


@pytest.fixture(scope="module")
def whole(model, rows, features):
    """Logits of all rows in one uncached pass."""
    graph, params = model
    return np.asarray(forward(graph, params, batch(rows, 48), features=features).logits)


def test_prefill_then_single_tokens_equal_one_pass(model, rows, features, whole):
    graph, params = model
    lengths = np.asarray([len(ids) for ids, _, _ in rows])
    prompts = lengths - [4, 20, 0]  # the last row is complete from the start
    cache = qwen2_5_vl.init_cache(CONFIG, 3, SLOTS)
    out = forward(graph, params, batch(part(rows, [0] * 3, prompts), 48), cache, features=features)
    assert out.cache.lengths.tolist() == prompts.tolist()
    for number, count in enumerate(prompts):
        np.testing.assert_allclose(out.logits[number, :count], whole[number, :count], atol=1e-5)
    done = prompts.copy()
    while (done < lengths).any():
        stops = np.minimum(done + 1, lengths)
        out = forward(graph, params, batch(part(rows, done, stops), 1), out.cache)
        assert out.cache.lengths.tolist() == stops.tolist()
        for number in np.flatnonzero(stops > done):
            np.testing.assert_allclose(
                out.logits[number, 0], whole[number, done[number]], atol=1e-5
            )
        done = stops


def test_chunks_with_pictures_extend_a_cache(model, rows, features, whole):
    graph, params = model
    lengths = np.asarray([len(ids) for ids, _, _ in rows])
    # Row 0's second picture starts in the second chunk; row 1 sits the second chunk out.
    cuts = [[5, 11, 2], [30, 11, 3], lengths]
    cache, starts = qwen2_5_vl.init_cache(CONFIG, 3, SLOTS), np.zeros(3, int)
    for stops in np.asarray(cuts):
        inputs = batch(part(rows, starts, stops), 32)
        out = forward(graph, params, inputs, cache, features=features)
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            np.testing.assert_allclose(
                out.logits[number, : stop - start], whole[number, start:stop], atol=1e-5
            )
        cache, starts = out.cache, stops
    assert cache.lengths.tolist() == lengths.tolist()


def test_padding_writes_nothing_to_the_cache(model, rows, features):
    graph, params = model
    cache = qwen2_5_vl.init_cache(CONFIG, 3, SLOTS)
    out = forward(graph, params, batch(rows, 48), cache, features=features)
    kv = np.asarray(out.cache.kv)
    kv = np.moveaxis(kv, 3, 1) if heads_first(kv) else kv
    by_row = kv.reshape(2, 3, -1, *kv.shape[2:])
    for number, (ids, _, _) in enumerate(rows):
        assert not by_row[:, number, len(ids) :].any()
        assert by_row[:, number, len(ids) - 1].any()
    full = dataclasses.replace(out.cache, lengths=jnp.full((3,), cache.slots, jnp.int32))
    after = forward(graph, params, batch(part(rows, [0] * 3, [1] * 3), 1), full).cache
    np.testing.assert_array_equal(after.kv, out.cache.kv)  # past the last slot: dropped


def test_packed_rows_equal_separate_ones(model, rows, features, whole):
    graph, params = model
    order = [1, 2, 0]
    joined = tuple(np.concatenate([rows[n][part] for n in order], axis=-1) for part in range(3))
    segments = np.concatenate([[n + 1] * len(rows[n][0]) for n in order])
    length = len(joined[0]) + 7
    segments = np.pad(segments, (0, 7)).astype(np.int32)[None]
    logits = forward(graph, params, batch([joined], length, segments), features=features).logits[0]
    at = 0
    for n in order:
        count = len(rows[n][0])
        np.testing.assert_allclose(logits[at : at + count], whole[n, :count], atol=1e-5)
        at += count


def test_rows_do_not_see_one_another(model, rows, features, whole):
    graph, params = model
    for number, one in enumerate(rows):
        alone = forward(graph, params, batch([one], 48), features=features).logits[0]
        count = len(one[0])
        np.testing.assert_allclose(alone[:count], whole[number, :count], atol=1e-5)


def test_pictures_do_not_see_one_another(model, features):
    graph, params = model
    at = 0
    for picture in pictures():
        count = len(picture.patches) // 4
        alone = encode(graph, params, layout.vision_inputs([picture], CONFIG.vision))
        np.testing.assert_allclose(alone[:count], features[at : at + count], atol=2e-5)
        at += count


def test_padding_patches_change_nothing_and_get_no_gradient(model, rows):
    graph, params = model
    plan = layout.vision_inputs(pictures(), CONFIG.vision)
    used = sum(len(p.patches) for p in pictures())
    assert used < len(plan.patches)
    wild = plan.patches.copy()
    wild[used:] = 1e9
    inputs = batch(rows, 48)

    @functools.partial(jax.jit)
    def run(patches, params):
        def loss(patches, params):
            vision = dataclasses.replace(plan, patches=patches)
            out = qwen2_5_vl.forward(graph, params, dataclasses.replace(inputs, vision=vision))
            logits = jnp.where((inputs.segments > 0)[..., None], out.logits, 0)
            return jnp.sin(logits).sum(), logits

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(patches, params)

    (_, calm_logits), calm = run(plan.patches, params)
    (_, wild_logits), rough = run(wild, params)
    np.testing.assert_array_equal(calm_logits, wild_logits)
    assert np.asarray(calm[0][:used]).any() and not np.asarray(rough[0][used:]).any()
    jax.tree.map(np.testing.assert_array_equal, calm[1], rough[1])


def test_recomputing_layers_changes_no_gradient(model, rows, features):
    _, params = model
    inputs = batch(rows, 48)

    def gradient(remat):
        graph, _ = qwen2_5_vl.abstract(dataclasses.replace(CONFIG, remat=remat))

        def loss(params):
            return jnp.sin(
                qwen2_5_vl.forward(graph, params, inputs, features=features).logits
            ).sum()

        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.grad(loss), compiler_options=quick)(params)["text"]

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())

    jax.tree.map(close, gradient(True), gradient(False))


def test_hidden_states_unembed_to_the_logits(model, rows):
    graph, params = model
    out = forward(graph, params, batch(rows, 48))
    logits = jax.jit(qwen2_5_vl.unembed, static_argnums=0)(graph, params, out.hidden[:, :5])
    np.testing.assert_allclose(logits, out.logits[:, :5], atol=1e-6)
    without = qwen2_5_vl.forward(graph, params, batch(rows, 48), logits=False)
    assert without.logits is None and without.cache is None


def test_an_image_token_without_index_is_text(model):
    graph, params = model
    ids = np.full((1, 4), IMAGE, np.int32)
    where = np.broadcast_to(np.arange(4, dtype=np.int32), (3, 1, 4))
    text = Inputs(ids, where, np.ones_like(ids), np.full_like(ids, -1))
    noise = jnp.full((8, CONFIG.text.hidden), jnp.nan)
    with_features = forward(graph, params, text, features=noise).logits
    np.testing.assert_array_equal(with_features, forward(graph, params, text).logits)


def test_attention_of_a_row_that_may_see_nothing_is_finite():
    q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 5, 2, 8))
    out = attend(q, k, jnp.arange(5.0)[None, :, None, None] * k, jnp.zeros((1, 2, 5), bool))
    np.testing.assert_allclose(out, 2.0, rtol=1e-6)


def other_order(kv):
    """A pool [X, S, 2K, H] heads first: [X, 2, K, S, H]."""
    pages, page, both, size = kv.shape
    return kv.reshape(pages, page, both // 2, 2, size).transpose(0, 3, 2, 1, 4)


@pytest.mark.parametrize("page, turned", [(4, False), (16, False), (32, False), (8, True)])
def test_cached_attention_equals_the_reference_and_ignores_the_neighbours(
    page, turned, monkeypatch
):
    """Pages lie anywhere in the pool, and two rows share their first one; blocks of 32 slots."""
    monkeypatch.setattr(xla, "SLOTS", 32)
    rng = np.random.default_rng(page)
    rows, queries, layers, each = 3, 2, 2, 96 // page
    q = jnp.asarray(rng.normal(size=(rows, queries, 4, 8)), jnp.float32)
    pages = rows * each + 3
    kv = jnp.asarray(rng.normal(size=(layers * pages, page, 4, 8)), jnp.float32)
    tables = rng.permutation(pages)[: rows * each].reshape(rows, each).astype(np.int32)
    tables[1, 0] = tables[0, 0]
    run = jax.jit(lambda *arguments: attend_cached(*arguments))
    pool = other_order(kv) if turned else kv
    ends = [3, 48, 96]
    own = jnp.asarray([[end - 2, end - 1] for end in ends], jnp.int32)
    mask = jnp.arange(96) <= own[:, :, None]
    for layer in range(layers):
        lines = kv[layer * pages + tables].reshape(rows, 96, 2, 2, 8)
        found = run(q, pool, tables, layer * pages, own, 96)
        expected = attend(q, lines[..., 0, :], lines[..., 1, :], mask)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        for row, end in enumerate(ends):  # the longest row decides how much is read
            alone = run(q, pool, tables, layer * pages, own, end)
            np.testing.assert_array_equal(alone[row], found[row])


def test_what_is_not_finite_in_another_rows_page_stays_there():
    """Beyond a row's end its table points anywhere; 0 times infinity would be no number."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    kv = np.asarray(rng.normal(size=(3, 4, 4, 8)), np.float32)
    kv[1:] = np.nan
    kv[0, 2:] = np.inf
    tables, own = jnp.asarray([[0, 1, 2]]), jnp.asarray([[1]], jnp.int32)
    found = attend_cached(q, jnp.asarray(kv), tables, 0, own, 12)
    clean = attend_cached(q, jnp.nan_to_num(kv, posinf=0), tables, 0, own, 12)
    np.testing.assert_array_equal(found, clean)


def test_parts_of_one_conversation_may_sit_in_several_rows(model, rows, features, whole):
    graph, params = model
    ids = rows[0][0]
    cache = qwen2_5_vl.init_cache(CONFIG, 3, SLOTS)
    starts = np.asarray([0, 7, 20])
    stops = np.asarray([7, 20, len(ids)])
    cache = dataclasses.replace(
        cache, tables=jnp.tile(cache.tables[:1], (3, 1)), lengths=jnp.asarray(starts, jnp.int32)
    )
    inputs = batch(part([rows[0]] * 3, starts, stops), 32)
    out = forward(graph, params, inputs, cache, features=features)
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        np.testing.assert_allclose(
            out.logits[number, : stop - start], whole[0, start:stop], atol=1e-5
        )


def test_copied_pages_are_equal_in_every_layer():
    kv = jnp.arange(2 * 5 * 3 * 4 * 2, dtype=jnp.float32).reshape(10, 3, 4, 2)
    source, target = jnp.asarray([0, 3, 1]), jnp.asarray([2, 5, 4])  # 5: not used
    found = copy_pages(kv, 2, source, target)
    expected = np.asarray(kv).reshape(2, 5, 3, 4, 2).copy()
    expected[:, [2, 4]] = expected[:, [0, 1]]
    np.testing.assert_array_equal(found, expected.reshape(kv.shape))


def test_the_graph_is_hashable_and_parameters_are_plain(model):
    graph, params = model
    again, shapes = qwen2_5_vl.abstract(CONFIG)
    assert hash(again) == hash(graph) and again == graph
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert {type(node) for node in (params, params["text"], params["vision"]["layers"])} == {dict}


def test_layers_apart_equal_the_stack(model, rows, features, whole):
    """Features, logits, cached logits and gradients; other leaves are shared."""
    graph, params = model
    apart = qwen2_5_vl.unstack(params)
    assert len(apart["text"]["layers"]) == len(apart["vision"]["layers"]) == 2
    assert apart["text"]["embed"]["table"] is params["text"]["embed"]["table"]
    assert qwen2_5_vl.unstack(apart)["text"]["layers"] is apart["text"]["layers"]
    vision = layout.vision_inputs(pictures(), CONFIG.vision)
    assert np.abs(encode(graph, apart, vision) - features).max() < 1e-5
    inputs = dataclasses.replace(batch(rows, 48), vision=vision)
    valid = inputs.segments > 0
    cache = qwen2_5_vl.init_cache(CONFIG, 3, SLOTS)
    for store in (None, cache):
        out = forward(graph, apart, inputs, store, features=features)
        assert np.abs(np.asarray(out.logits) - whole)[valid].max() < 1e-5

    def loss(params):
        logits = qwen2_5_vl.forward(graph, params, inputs).logits
        return jnp.where(valid, jax.nn.logsumexp(logits, -1), 0).sum()

    quick = {"xla_backend_optimization_level": 0}
    gradient = jax.jit(jax.grad(loss), compiler_options=quick)
    expected, found = qwen2_5_vl.unstack(gradient(params)), gradient(apart)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), expected, found
    )


def test_layers_apart_recompute_when_asked(model, rows, features):
    """Outside a loop XLA would merge the two computations of a layer if nothing kept them apart."""
    apart = qwen2_5_vl.unstack(model[1])
    inputs = batch(rows, 48)

    def products(remat: bool) -> int:
        graph, _ = qwen2_5_vl.abstract(dataclasses.replace(CONFIG, remat=remat))

        def loss(params):
            return qwen2_5_vl.forward(graph, params, inputs, features=features).logits.sum()

        return jax.jit(jax.grad(loss)).lower(apart).compile().as_text().count(" dot(")

    assert products(remat=True) >= products(remat=False) + 2 * 7  # two layers of seven kernels
