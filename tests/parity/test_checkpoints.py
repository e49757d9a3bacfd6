"""Folders as other programs leave them, read as the original reads them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import test_parity
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmsr_jax.model.config import preset
from mmsr_jax.weights import hf, hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def published() -> dict:
    return hf_config.flat(preset("7b"), "bfloat16")


def until_4_51() -> dict:
    """transformers 4.49 left out of the tower what its class has by default."""
    return published() | {
        "vision_config": {
            "hidden_size": 1280,
            "in_chans": 3,
            "model_type": "qwen2_5_vl",
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
            "torch_dtype": "bfloat16",
        },
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    }


def nested(outer: dict, inner: dict) -> dict:
    """transformers 4.52 to 4.57, with its words on ties."""
    flat = hf_config.flat(preset("3b"), "bfloat16")
    del flat["tie_word_embeddings"]
    text = {name: value for name, value in flat.items() if name != "vision_config"}
    return flat | {"text_config": text | {"model_type": "qwen2_5_vl_text"} | inner} | outer


def ties(word: bool | None) -> dict:
    return {} if word is None else {"tie_word_embeddings": word}


CONFIGS = [
    published(),
    until_4_51(),
    *(nested(ties(a), ties(b)) for a in (None, False, True) for b in (None, False, True)),
]


@pytest.mark.parametrize("written", CONFIGS)
def test_configs_mean_what_they_mean_to_the_original(written, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    ours = hf_config.read(tmp_path)
    assert ours.text.tied == theirs.tie_word_embeddings
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.text.layers, ours.text.hidden) == (text.num_hidden_layers, text.hidden_size)
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert ours.vision.depth == vision.depth and ours.vision.hidden == vision.hidden_size
    assert ours.vision.heads == vision.num_heads
    assert ours.vision.intermediate == vision.intermediate_size
    assert ours.vision.out_hidden == vision.out_hidden_size
    assert ours.vision.full_attention_layers == tuple(vision.fullatt_block_indexes)
    assert (ours.vision.patch_size, ours.vision.window_size) == (
        vision.patch_size,
        vision.window_size,
    )


def test_the_towers_defaults_are_those_of_the_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(until_4_51()))
    assert hf_config.read(tmp_path) == preset("7b")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tied")
    test_parity.original_model(tied=True).save_pretrained(folder)
    return folder


def original(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.state_dict()


def test_a_single_file_goes_before_an_index(tied, tmp_path):
    """A save in one file over an older one in shards: the index stays behind."""
    shutil.copytree(tied, tmp_path, dirs_exist_ok=True)
    old = {name: torch.zeros_like(tensor) for name, tensor in load_file(tied / SINGLE).items()}
    shard = "model-00001-of-00001.safetensors"
    save_file(old, tmp_path / shard, metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(old, shard)}))
    theirs = original(tmp_path)["model.language_model.embed_tokens.weight"].numpy()
    assert np.abs(theirs).max() > 0
    np.testing.assert_array_equal(hf.load(tmp_path).params["text"]["embed"]["table"], theirs)


def test_a_second_head_of_a_tied_model_must_be_the_table(tied, tmp_path):
    """The original would use both, others only the table: nobody can know which was meant."""
    shutil.copytree(tied, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tied / SINGLE)
    save_file(
        tensors | {HEAD: tensors[TABLE].clone()}, tmp_path / SINGLE, metadata={"format": "pt"}
    )
    assert "head" not in hf.load(tmp_path).params["text"]
    other = tensors | {HEAD: tensors[TABLE] + 1}
    save_file(other, tmp_path / SINGLE, metadata={"format": "pt"})
    found = original(tmp_path)
    assert torch.equal(found[HEAD], other[HEAD]) and not torch.equal(found[HEAD], other[TABLE])
    with pytest.raises(ValueError, match=f"ties {HEAD} to {TABLE}, and the files hold two"):
        hf.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    head = hf.load(tmp_path).params["text"]["head"]["kernel"]
    np.testing.assert_array_equal(head, found[HEAD].numpy().T)
