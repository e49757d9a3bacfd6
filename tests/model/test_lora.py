"""Adapters: which modules get one, and what a model with them computes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmsr_jax.inputs import layout
from mmsr_jax.model import lora, qwen2_5_vl
from mmsr_jax.model.config import preset

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERY = lora.LoRAConfig(
    rank=3, alpha=4.5, targets=(*ALL, "qkv", "attn.proj", r"merger\.mlp\.[02]"), vision=True
)
forward = jax.jit(
    qwen2_5_vl.forward,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},  # compiles in half the time
)


def paths(config, **fields):
    return {".".join(m.path) for m in lora.targeted(config, lora.LoRAConfig(**fields))}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"targets": ("q_proj",)}, {"text.layers.attention.q"}),
        ({"targets": ("(q|v)_proj",)}, {"text.layers.attention.q", "text.layers.attention.v"}),
        ({"targets": ("gate_proj",)}, {"text.layers.mlp.gate"}),
        (
            {"targets": ("gate_proj",), "vision": True},
            {"text.layers.mlp.gate", "vision.layers.mlp.gate"},
        ),
        ({"targets": ("visual.*gate_proj",), "vision": True}, {"vision.layers.mlp.gate"}),
        ({"targets": ("attn.proj", "qkv"), "vision": True},
         {"vision.layers.proj", "vision.layers.qkv"}),
        ({"targets": ("mlp.0",), "vision": True}, {"vision.merger.inner"}),
        ({"targets": (r"model\.language_model\.layers\.\d+\.mlp\.up_proj",)},
         {"text.layers.mlp.up"}),
    ],
)  # fmt: skip
def test_targets(tiny, fields, found):
    assert paths(tiny.model, **fields) == found


def test_default_targets_are_all_of_the_text(tiny):
    assert len(paths(tiny.model)) == 7
    assert all(p.startswith("text.layers.") for p in paths(tiny.model))
    assert len(paths(tiny.model, targets=(".*",), vision=True)) == 14


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ("q_proj", "query")},
            r"target 'query' matches no module; there are self_attn\.q_proj, .*mlp\.down_proj; "
            r"with vision = True also attn\.qkv, .*visual\.merger\.mlp\.2",
        ),
        ({"targets": ("qkv",)}, "target 'qkv' matches no module"),
        ({"targets": ("proj",)}, "target 'proj' matches no module"),
        ({"targets": (r"layers\.0\.mlp\.up_proj",)}, r"matches 1 of 2 layers of mlp\.up_proj"),
    ],
)  # fmt: skip
def test_a_target_that_matches_nothing_is_named(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl.abstract(tiny.model, lora=lora.LoRAConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "got rank 0"),
        ({"alpha": 0.0}, r"alpha 0\.0"),
        ({"targets": ("(q_proj",)}, r"'\(q_proj' is no regular expression"),
        ({"targets": ()}, "at least one target"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(**fields)


@pytest.fixture(scope="module")
def graph(tiny):
    return qwen2_5_vl.abstract(tiny.model, lora=EVERY)[0]


@pytest.fixture(scope="module")
def shapes(tiny):
    return lora.split(qwen2_5_vl.abstract(tiny.model, lora=EVERY)[1])[1]


@pytest.fixture(scope="module")
def fresh(shapes):
    return lora.init(shapes, jax.random.key(0))


@pytest.fixture(scope="module")
def drawn(shapes):
    """An adapter without a zero in it."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype("f"), shapes)


@pytest.fixture(scope="module")
def inputs(tiny):
    tokens = tiny.conversation((tiny.picture(6, 4), "What capital?"), seed=3)
    return qwen2_5_vl.Inputs(
        tokens.ids[None],
        tokens.positions[:, None],
        np.ones((1, len(tokens)), np.int32),
        tokens.image_index[None],
        layout.vision_inputs(tokens.pictures, tiny.model.vision),
    )


def test_split_and_join_are_by_reference(tiny, drawn):
    base = tiny.params()
    joined = lora.join(base, drawn)
    assert jax.tree.structure(joined) == jax.tree.structure(
        qwen2_5_vl.abstract(tiny.model, lora=EVERY)[1]
    )
    for again, given in zip(lora.split(joined), (base, drawn), strict=True):
        assert jax.tree.structure(again) == jax.tree.structure(given)
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, given)), strict=True))
    assert lora.split(base)[1] == {}
    assert jax.tree.structure(base) == jax.tree.structure(tiny.abstract[1])


def test_a_fresh_adapter_changes_nothing(tiny, graph, fresh, inputs):
    base = tiny.params()
    found = forward(graph, lora.join(base, fresh), inputs).logits
    np.testing.assert_array_equal(found, forward(tiny.graph, base, inputs).logits)


def test_how_a_fresh_adapter_is_drawn(tiny, fresh):
    inputs = {"q": 32, "o": 64, "down": 64, "inner": 128, "qkv": 32}
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        if path[-1].key == lora.B:
            assert not np.any(leaf)
        elif path[-2].key in inputs and path[0].key + path[-2].key != "visiondown":
            bound = inputs[path[-2].key] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert leaf.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    leaves = [np.asarray(a) for a in jax.tree.leaves(fresh) if np.any(a)]
    assert len({a.tobytes() for a in leaves}) == len(leaves) == 14
    few = dataclasses.replace(EVERY, targets=("q_proj",))
    alone = lora.split(qwen2_5_vl.abstract(tiny.model, lora=few)[1])[1]
    same, other = (
        lora.init(alone, jax.random.key(seed))["text"]["layers"]["attention"]["q"][lora.A]
        for seed in (0, 1)
    )
    whole = fresh["text"]["layers"]["attention"]["q"][lora.A]
    np.testing.assert_array_equal(same, whole)  # whatever the other targets are
    assert np.any(other != whole)


def test_each_module_computes_what_its_merged_kernel_computes(tiny, graph, drawn, inputs):
    base = tiny.params()
    bare = forward(tiny.graph, base, inputs).logits
    every = lora.targeted(tiny.model, EVERY)
    assert len(every) == 14
    for module in (None, *every):

        def only(path, leaf, module=module):
            mine = module is None or tuple(p.key for p in path[:-1]) == module.path
            return leaf if mine else np.zeros_like(leaf)

        joined = lora.join(base, jax.tree_util.tree_map_with_path(only, drawn))
        merged = lora.merge(joined, EVERY)
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        found = forward(graph, joined, inputs).logits
        wanted = forward(tiny.graph, merged, inputs).logits
        assert np.abs(found - bare).max() > 0.01, module
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5, err_msg=str(module))


def test_merging_rounds_once(tiny, drawn):
    """bfloat16 kernels: the sum is made in float32, leaves without adapter are the same objects."""
    base = jax.tree.map(lambda x: x.astype("bfloat16"), tiny.params())
    own = drawn["text"]["layers"]["attention"]["o"]
    alone = {"text": {"layers": {"attention": {"o": own}}}}
    merged = lora.merge(lora.join(base, alone), EVERY)
    delta = np.einsum("lnhr,lrd->lnhd", own[lora.A], own[lora.B], dtype=np.float64) * 1.5
    kernel = base["text"]["layers"]["attention"]["o"]["kernel"]
    wanted = (np.asarray(kernel, np.float64) + delta).astype("f").astype(kernel.dtype)
    found = np.asarray(merged["text"]["layers"]["attention"]["o"]["kernel"])
    # A sum that falls between two bfloat16 numbers may round to the other in float32.
    assert found.dtype == wanted.dtype and (found != wanted).mean() < 0.001
    assert merged["text"]["embed"]["table"] is base["text"]["embed"]["table"]


def test_merging_takes_layers_apart_too(tiny, drawn):
    """As the engine has them, its token table in parts."""
    joined = lora.join(tiny.params(), drawn)
    merged = lora.merge(qwen2_5_vl.unstack(joined, 3), EVERY)
    wanted = qwen2_5_vl.unstack(lora.merge(joined, EVERY), 3)
    assert jax.tree.structure(merged) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, merged, wanted)


def test_adapters_are_kept_in_their_own_dtype(tiny):
    half = dataclasses.replace(tiny.model, dtype="bfloat16", param_dtype="bfloat16")
    base, adapter = lora.split(qwen2_5_vl.abstract(half, lora=EVERY)[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"float32"}
    config = dataclasses.replace(EVERY, param_dtype="bfloat16")
    adapter = lora.split(qwen2_5_vl.abstract(half, lora=config)[1])[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"bfloat16"}


def test_published_sizes():
    """7B, rank 16, the default targets: PEFT's well-known count, and a layout by the rules."""
    mesh = jax.sharding.AbstractMesh((4, 4), ("fsdp", "tensor"))
    adapter = lora.split(qwen2_5_vl.abstract(preset("7b"), mesh, lora=lora.LoRAConfig())[1])[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 28 * 16 * (
        (3584 + 3584) * 2 + (3584 + 512) * 2 + (3584 + 18944) * 3
    )
    layers = adapter["text"]["layers"]
    q, down = layers["attention"]["q"], layers["mlp"]["down"]
    assert q[lora.A].sharding.spec == P(None, "fsdp", None)
    assert q[lora.B].sharding.spec == P(None, None, "tensor", None)
    assert down[lora.A].sharding.spec == P(None, "tensor", None)
    assert down[lora.B].sharding.spec == P(None, None, "fsdp")
