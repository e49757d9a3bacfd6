"""Adapters exchanged with the real `peft` on the original model, float32, both ways."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmsr_jax.inputs import layout
from mmsr_jax.model import lora, qwen2_5_vl
from mmsr_jax.types import Picture
from mmsr_jax.weights import hf
from mmsr_jax.weights import peft as ours

IMAGE, START, END = 60, 62, 63
TEXT = lora.LoRAConfig(rank=3, alpha=5.0)
EVERYTHING = lora.LoRAConfig(
    rank=5,
    alpha=8.0,
    targets=(*TEXT.targets, "qkv", r"attn\.proj", "merger.mlp.0", "merger.mlp.2"),
    vision=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A random original: grouped heads, sizes that all differ, no norm one, no bias zero."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2],
            },
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2,
            "out_hidden_size": 48, "fullatt_block_indexes": [1], "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE, video_token_id=61, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(5)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.08))
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def original(folder):
    """A fresh copy: peft changes a model in place."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def loaded(folder) -> hf.Loaded:
    return hf.load(folder)


@pytest.fixture(scope="module")
def row(loaded):
    """One row with two pictures, for ours and for the original."""
    rng = np.random.default_rng(2)
    grids = [(1, 10, 6), (1, 4, 8)]
    pictures = [Picture(rng.normal(size=(h * w, 1176)).astype("f"), (t, h, w)) for t, h, w in grids]
    ids = list(rng.integers(3, 60, 5))
    for picture in pictures:
        ids += (
            [START] + [IMAGE] * (len(picture.patches) // 4) + [END] + list(rng.integers(3, 60, 3))
        )
    ids = np.asarray(ids, np.int32)
    index = np.where(ids == IMAGE, np.cumsum(ids == IMAGE) - 1, -1).astype(np.int32)
    config = loaded.config
    inputs = qwen2_5_vl.Inputs(
        ids[None],
        layout.positions(ids, grids, config)[0][:, None],
        np.ones((1, ids.size), np.int32),
        index[None],
        layout.vision_inputs(pictures, config.vision),
    )
    tokens = torch.from_numpy(ids).long()[None]
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.from_numpy(np.concatenate([p.patches for p in pictures])),
        "image_grid_thw": torch.tensor(grids),
    }
    return inputs, batch


def drawn(config, wanted, seed=0):
    """An adapter without a zero in it."""
    rng = np.random.default_rng(seed)
    shapes = lora.split(qwen2_5_vl.abstract(config, lora=wanted)[1])[1]
    return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.15).astype("f"), shapes)


# Run a few times: optimising takes longer than running.
forward = jax.jit(
    qwen2_5_vl.forward,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


def our_logits(loaded, inputs, wanted=None, adapter=None, params=None):
    graph, _ = qwen2_5_vl.abstract(loaded.config, lora=wanted)
    params = loaded.params if params is None else params
    params = params if adapter is None else lora.join(params, adapter)
    return np.asarray(forward(graph, params, inputs).logits)


def original_logits(model, batch):
    # State that the original keeps between calls.
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    with torch.no_grad():
        return model(**batch).logits.numpy()


@pytest.mark.parametrize("wanted", [TEXT, EVERYTHING], ids=["text", "both towers"])
def test_peft_loads_ours(loaded, original, folder, row, tmp_path, wanted):
    inputs, batch = row
    adapter = drawn(loaded.config, wanted)
    joined = lora.join(loaded.params, adapter)
    ours.save(joined, loaded.config, wanted, tmp_path, base_name=str(folder))
    bare = our_logits(loaded, inputs)
    found = our_logits(loaded, inputs, wanted, adapter)
    merged = our_logits(loaded, inputs, params=lora.merge(joined, wanted))
    assert np.abs(found - bare).max() > 0.1
    model = peft.PeftModel.from_pretrained(original, tmp_path).eval()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (wanted.rank, wanted.alpha)
    assert config.base_model_name_or_path == str(folder)
    theirs = original_logits(model, batch)
    np.testing.assert_allclose(theirs, found, atol=1e-5, rtol=0)
    np.testing.assert_allclose(merged, found, atol=1e-5, rtol=0)
    # peft has put adapters where ours are, and every one of them was read from the file.
    held = peft.get_peft_model_state_dict(model)
    written = load_file(tmp_path / ours.TENSORS)
    assert held.keys() == written.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(tensor.numpy(), written[name])
    np.testing.assert_allclose(original_logits(model.merge_and_unload(), batch), merged, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["k_proj", "o_proj", "gate_proj", "qkv", "attn.proj", "merger.mlp.2"],
        r"model\.language_model\.layers\.\d+\.mlp\.down_proj",
    ],
    ids=["two", "both towers", "expression"],
)
def test_ours_loads_what_peft_made(loaded, original, row, tmp_path, targets):
    inputs, batch = row
    torch.manual_seed(0)
    wanted = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(original, wanted).eval()
    model.save_pretrained(tmp_path)
    config, adapter = ours.load(tmp_path, loaded.config)
    assert (config.rank, config.alpha) == (4, 7)
    theirs = original_logits(model, batch)
    assert np.abs(theirs - our_logits(loaded, inputs)).max() > 0.01
    found = our_logits(loaded, inputs, config, adapter)
    np.testing.assert_allclose(found, theirs, atol=1e-5, rtol=0)


def test_what_is_saved_comes_back(loaded, tmp_path):
    adapter = drawn(loaded.config, EVERYTHING)
    ours.save(adapter, loaded.config, EVERYTHING, tmp_path)
    config, found = ours.load(tmp_path, loaded.config)
    assert lora.targeted(loaded.config, config) == lora.targeted(loaded.config, EVERYTHING)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    ours.save(found, loaded.config, config, tmp_path / "again")
    for name in (ours.CONFIG, ours.TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    ours.save(adapter, loaded.config, EVERYTHING, tmp_path / "half", dtype="bfloat16")
    _, short = ours.load(tmp_path / "half", loaded.config)
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b, jax.numpy.bfloat16).astype("f"))


def test_names_of_older_transformers_are_read(loaded, tmp_path):
    adapter = drawn(loaded.config, EVERYTHING)
    ours.save(adapter, loaded.config, EVERYTHING, tmp_path)
    tensors = load_file(tmp_path / ours.TENSORS)
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
        for name, t in tensors.items()
    }
    assert not older.keys() & tensors.keys()
    save_file(older, tmp_path / ours.TENSORS)
    jax.tree.map(np.testing.assert_array_equal, ours.load(tmp_path, loaded.config)[1], adapter)


def test_what_does_not_fit_is_named(loaded, tmp_path):
    ours.save(drawn(loaded.config, TEXT), loaded.config, TEXT, tmp_path)
    name = "base_model.model.model.language_model.layers.1.self_attn.k_proj.lora_A.weight"
    with safe_open(tmp_path / ours.TENSORS, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert tensors[name].shape == (3, 48)
    head = "base_model.model.lm_head.lora_A.weight"
    wrong = tensors | {head: tensors[name], name.replace("1", "2"): tensors[name].T.copy()}
    del wrong[name]
    save_file(wrong, tmp_path / ours.TENSORS)
    with pytest.raises(ValueError) as caught:
        ours.load(tmp_path, loaded.config)
    for part in (
        "missing model.layers.1.self_attn.k_proj.lora_A.weight",
        "unexpected lm_head.lora_A.weight",
        "misshaped model.layers.2.self_attn.k_proj.lora_A.weight: (48, 3), the model wants (3, 48)",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="rank and targets of the config say"):
        other = dataclasses.replace(TEXT, rank=4)
        ours.save(drawn(loaded.config, TEXT), loaded.config, other, tmp_path)
    (tmp_path / ours.TENSORS).write_bytes(b"\x10\0\0")
    with pytest.raises(ValueError, match="damaged"):
        ours.load(tmp_path, loaded.config)
    old = name.replace("model.language_model.", "model.")
    save_file(tensors | {old: 2 * tensors[name]}, tmp_path / ours.TENSORS)
    with pytest.raises(ValueError, match="under two names"):
        ours.load(tmp_path, loaded.config)
    eighths = {name: torch.zeros(t.shape, dtype=torch.float8_e4m3fn) for name, t in tensors.items()}
    torch_save(eighths, tmp_path / ours.TENSORS)
    with pytest.raises(ValueError, match="damaged or quantised"):
        ours.load(tmp_path, loaded.config)
    for text in ("{", "[1]"):
        (tmp_path / ours.CONFIG).write_text(text)
        with pytest.raises(ValueError, match="is no JSON"):
            ours.load(tmp_path, loaded.config)
    with pytest.raises(ValueError, match="no PEFT adapter"):
        ours.load(tmp_path / "nowhere", loaded.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"init_lora_weights": "olora"}, "'olora' changes the weights beneath"),
        ({"init_lora_weights": "corda"}, "'corda' changes the weights beneath"),
        ({"init_lora_weights": ["loftq"]}, "changes the weights beneath"),
        ({"r": "3"}, "r is '3', from 1 to"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None, above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, above 0"),
    ],
)
def test_other_kinds_of_adapter_are_refused(loaded, tmp_path, change, message):
    ours.save(drawn(loaded.config, TEXT), loaded.config, TEXT, tmp_path)
    settings = json.loads((tmp_path / ours.CONFIG).read_text())
    (tmp_path / ours.CONFIG).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        ours.load(tmp_path, loaded.config)


@pytest.mark.parametrize(
    "start", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
)
def test_adapters_that_change_the_weights_beneath_are_refused(original, loaded, tmp_path, start):
    """What `peft` makes of the base when it loads an adapter that began so."""
    wanted = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=start)
    name = "model.language_model.layers.0.self_attn.q_proj"
    before = original.get_submodule(name).weight.detach().clone()
    made = peft.get_peft_model(original, wanted)
    made.save_pretrained(tmp_path)
    beneath = made.get_base_model().get_submodule(name).base_layer.weight
    if torch.equal(beneath, before):
        assert ours.load(tmp_path, loaded.config)[0].rank == 4
        return
    with pytest.raises(ValueError, match=f"{start}' changes the weights beneath"):
        ours.load(tmp_path, loaded.config)
