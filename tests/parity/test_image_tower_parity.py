"""Towers of CLIP and SigLIP against the original's: the same folder, the same pictures."""

import json

import numpy as np
import pytest
import random_towers
import torch
from safetensors.torch import load_file, save_file

from mmsr_jax.embed.image_tower import TowerEmbedder, TowerEmbedderConfig
from mmsr_jax.weights import image_tower

CASES = {
    "CLIPModel": {},
    "CLIPVisionModelWithProjection": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "SiglipModel": {},
    # 45 pixels are 5 patches and 5 pixels, which are not seen; heads of 12 numbers.
    "SiglipVisionModel": {"image_size": 45, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
}
SIZES = TowerEmbedderConfig(pictures=4)


def embedder(name: str, folder) -> TowerEmbedder:
    return TowerEmbedder("clip" if name.startswith("CLIP") else "siglip", str(folder), SIZES)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_the_originals(name, tmp_path):
    original = random_towers.original(name, **CASES[name])
    original.save(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # many files
    shown = random_towers.pictures(7)
    expected = original.embed(shown)
    made = embedder(name, tmp_path)
    found = made.embed(shown)
    assert found.shape == (7, made.size) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # Pictures are told apart: a constant would pass the lines above if theirs were one.
    assert np.abs(expected - expected.mean(0)).max() > 0.05
    alone = np.concatenate([made.embed([image]) for image in shown])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    assert made._encode._cache_size() == 2  # one program for batches, one for a single picture


def test_every_weight_is_where_it_belongs(tmp_path):
    """A bias of keys changes no output, so parity of vectors would not see it lost."""
    original = random_towers.original("SiglipVisionModel")
    original.save(tmp_path)
    params = image_tower.load(tmp_path).params
    state = {name: value.numpy() for name, value in original.model.state_dict().items()}
    thirds = np.split(state["head.attention.in_proj_bias"], 3)
    for third, name in zip(thirds, "qkv", strict=True):
        ours = params["head"]["attention"][name]["bias"]
        np.testing.assert_array_equal(np.ravel(ours), third)
        for layer in range(3):
            published = state[f"encoder.layers.{layer}.self_attn.{name}_proj.bias"]
            ours = params["layers"]["attention"][name]["bias"][layer]
            np.testing.assert_array_equal(np.ravel(ours), published)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32(kind, tmp_path):
    original = random_towers.original("CLIPVisionModelWithProjection")
    original.model.to(kind)
    original.save(tmp_path)
    original.model.to(torch.float32)  # what the rounded numbers are
    shown = random_towers.pictures(3)
    found = embedder("CLIP", tmp_path).embed(shown)
    np.testing.assert_allclose(found, original.embed(shown), rtol=0, atol=1e-5)


def test_bfloat16_is_near(tmp_path):
    original = random_towers.original("SiglipModel")
    original.save(tmp_path)
    made = TowerEmbedder("siglip", str(tmp_path), TowerEmbedderConfig(4, dtype="bfloat16"))
    shown = random_towers.pictures(3)
    found, expected = made.embed(shown), original.embed(shown)
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - expected).max() < 0.03


def test_folders_of_older_versions(tmp_path):
    """transformers 4 wrote "vision_model." before a vision model's names and kept position_ids;
    OpenAI's configs of 2021 say sizes as numbers and repeat the tower in vision_config_dict."""
    original = random_towers.original("CLIPModel")
    original.save(tmp_path)
    shown = random_towers.pictures(3)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    positions = torch.arange(26)[None]
    save_file(tensors | {"vision_model.embeddings.position_ids": positions}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config_dict"] = config["vision_config"]
    config["vision_config"] = {"hidden_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = tmp_path / "preprocessor_config.json"
    values = {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 45, "crop_size": 40,
        "do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3,
    }  # fmt: skip
    processor.write_text(json.dumps(values))
    found = embedder("CLIP", tmp_path).embed(shown)
    np.testing.assert_allclose(found, original.embed(shown), rtol=0, atol=1e-5)

    original = random_towers.original("SiglipVisionModel")
    original.save(tmp_path / "siglip")
    file = tmp_path / "siglip/model.safetensors"
    save_file({f"vision_model.{name}": value for name, value in load_file(file).items()}, file)
    found = embedder("Siglip", tmp_path / "siglip").embed(shown)
    np.testing.assert_allclose(found, original.embed(shown), rtol=0, atol=1e-5)
