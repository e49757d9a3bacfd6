"""Against the original implementation: checkpoints to and fro, bfloat16."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.types import Picture
from mmsr_jax.weights import hf, hf_config

IMAGE, VIDEO, START, END = 60, 61, 62, 63


def original_config(tied: bool) -> Qwen2_5_VLConfig:
    """Sizes that all differ from one another, so that no transposed kernel goes unseen."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 2, 2],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_heads": 2,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def original_model(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights, norms and biases moved away from 1 and 0, float32."""
    torch.manual_seed(3 + tied)
    model = Qwen2_5_VLForConditionalGeneration(original_config(tied)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim == 1 else 0.08
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def original(request, tmp_path_factory) -> tuple[Qwen2_5_VLForConditionalGeneration, pathlib.Path]:
    """The original model and the folder it was saved to."""
    torch.set_num_threads(1)
    model = original_model(request.param)
    folder = tmp_path_factory.mktemp("tied" if request.param else "untied")
    model.save_pretrained(folder)
    return model, folder


def read(folder):
    loaded = hf.load(folder)
    assert loaded.graph == qwen2_5_vl.abstract(loaded.config)[0]
    return loaded.config, loaded.params


def half(model) -> Qwen2_5_VLForConditionalGeneration:
    """The model in bfloat16, its angles in float32 as when it is loaded so."""
    copy = Qwen2_5_VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.bfloat16().eval()


def test_bfloat16_stays_close(original):
    """Long positions: angles kept in bfloat16 would be far off here."""
    model, folder = original
    config, params = read(folder)
    config = dataclasses.replace(config, dtype="bfloat16")
    graph, _ = qwen2_5_vl.abstract(config)
    rng = np.random.default_rng(11)
    ids = rng.integers(3, 60, (1, 40)).astype(np.int32)
    where = np.broadcast_to(np.arange(5000, 5040, dtype=np.int32), (3, 1, 40))
    inputs = qwen2_5_vl.Inputs(ids, where, np.ones_like(ids), np.full_like(ids, -1))
    ours = np.asarray(jax.jit(qwen2_5_vl.forward, static_argnums=0)(graph, params, inputs).logits)
    with torch.no_grad():
        kwargs = {
            "input_ids": torch.from_numpy(ids).long(),
            "position_ids": torch.from_numpy(where.copy()).long(),
        }
        exact = model(**kwargs).logits.float().numpy()
        theirs = half(model)(**kwargs).logits.float().numpy()
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_bfloat16_features_of_a_wide_picture_stay_close(original):
    model, folder = original
    config, params = read(folder)
    config = dataclasses.replace(config, dtype="bfloat16")
    graph, _ = qwen2_5_vl.abstract(config)
    grid = (1, 4, 160)
    patches = np.random.default_rng(12).normal(size=(640, 1176)).astype(np.float32)
    vision = layout.vision_inputs([Picture(patches, grid)], config.vision)
    encode = jax.jit(qwen2_5_vl.encode_images, static_argnums=0)
    ours = np.asarray(encode(graph, params, vision), np.float32)[:160]
    with torch.no_grad():
        pixels, grids = torch.from_numpy(patches), torch.tensor([grid])
        exact = model.model.visual(pixels, grids).pooler_output.numpy()
        narrow = half(model).model.visual(pixels.bfloat16(), grids).pooler_output
    theirs = narrow.float().numpy()
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_export_loads_strictly_in_the_original(original, tmp_path):
    model, folder = original
    config, params = read(folder)
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text('{"do_sample": false}')
    (source / "notes.txt").write_text("stays behind")
    tmp_path = tmp_path / "export"
    hf.save(params, config, tmp_path, source=source, dtype="float32", shard_bytes=60_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "generation_config.json").read_text() == '{"do_sample": false}'
    assert not (tmp_path / "notes.txt").exists()
    again, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    rope = model.config.text_config.rope_parameters
    assert rope.items() <= again.config.text_config.rope_parameters.items()
    back, params_again = read(tmp_path)
    assert back == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_names_of_programs_in_memory_load_too(original, tmp_path):
    model, folder = original
    model.save_pretrained(tmp_path, save_original_format=False)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert any(name.startswith("model.language_model.layers.0.") for name in file.keys())  # noqa: SIM118
    config, params = read(tmp_path)
    expected_config, expected = read(folder)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_errors_name_every_tensor(original, tmp_path):
    _, folder = original
    config, params = read(folder)
    hf.save(params, config, tmp_path)
    larger = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, layers=4, intermediate=81, tied=False),
        vision=dataclasses.replace(config.vision, depth=3, full_attention_layers=(1,)),
    )
    with pytest.raises(ValueError) as error:
        hf.load(tmp_path, config=larger)
    message = str(error.value)
    assert "missing model.layers.3.mlp.up_proj.weight" in message
    assert "unexpected visual.blocks.3.attn.qkv.bias" in message
    assert (
        "misshaped model.layers.0.mlp.down_proj.weight: (48, 80), config wants (48, 81)" in message
    )
    assert ("missing lm_head.weight" in message) == config.text.tied


def test_original_config_is_read_in_both_layouts(tmp_path):
    original_config(tied=False).save_pretrained(tmp_path)
    nested = hf_config.read(tmp_path)
    assert nested.text.mrope_section == (2, 2, 2) and nested.text.norm_eps == 1e-5
    assert nested.image_token_id == IMAGE and nested.text.head_dim == 12
