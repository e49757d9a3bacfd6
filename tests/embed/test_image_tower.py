"""Indices by a CLIP or SigLIP folder, and folders that are refused."""

import json
import shutil

import numpy as np
import pytest
import random_towers
from safetensors.torch import load_file, save_file

from mmsr_jax.cli.main import main
from mmsr_jax.embed import embedder
from mmsr_jax.embed.image_tower import TowerEmbedder, TowerEmbedderConfig

NAMES = {"clip": "CLIPModel", "siglip": "SiglipVisionModel"}
SIZES = TowerEmbedderConfig(pictures=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("towers")
    for kind, name in NAMES.items():
        random_towers.original(name).save(made / kind)
    return made


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the CLIP folder, to be spoilt."""
    return shutil.copytree(folders / "clip", tmp_path / "clip")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", NAMES)
def test_an_index_from_the_command_line(kind, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    for number, image in enumerate(random_towers.pictures(6)):
        image.save(tmp_path / f"source/{number}.png")
    weights = str(folders / kind)
    words = ["search", "index", "source", "out", "--pictures", kind, "--weights", weights]
    assert main(words) == 0
    assert f"6 pictures by {kind}, exact search" in capsys.readouterr().out
    assert main(words) == 0
    assert "out is up to date" in capsys.readouterr().out
    part = json.loads((tmp_path / "out/manifest.json").read_text())["pictures"]
    assert part["embedder"] == kind and part["weights"] == weights
    assert part["identity"].startswith(f"{kind}-")
    assert part["size"] == (24 if kind == "clip" else 48)
    for number in range(6):
        asked = ["search", "image", f"source/{number}.png", "--index", "out", "--count", "1"]
        assert main(asked) == 0
        assert capsys.readouterr().out.startswith(f"1. {number} ")
    # The same weights may lie elsewhere; others are refused.
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["pictures"]["weights"] = "gone"
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert main(["search", "serve", "out", "--port", "0"]) == 2
    assert "--weights says where they are now" in capsys.readouterr().err
    random_towers.original(NAMES[kind], seed=1).save(tmp_path / "other")
    assert main(["search", "serve", "out", "--port", "0", "--weights", "other"]) == 2
    assert f"was built with {kind} ({part['identity']})" in capsys.readouterr().err


def test_the_identity_follows_every_weight_and_the_preprocessing(folder, tmp_path):
    first = TowerEmbedder("clip", str(folder), SIZES)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert TowerEmbedder("clip", str(moved), SIZES).identity == first.identity
    half = TowerEmbedderConfig(pictures=4, dtype="bfloat16")
    assert TowerEmbedder("clip", str(folder), half).identity != first.identity
    change(moved / "preprocessor_config.json", resample=2)
    assert TowerEmbedder("clip", str(moved), SIZES).identity != first.identity
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.encoder.layers.1.mlp.fc1.weight"][3, 17] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert TowerEmbedder("clip", str(folder), SIZES).identity != first.identity


def test_no_pictures_and_weights_that_are_not_finite(folder):
    assert TowerEmbedder("clip", str(folder), SIZES).embed([]).shape == (0, 24)
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        TowerEmbedder("clip", str(folder), SIZES).embed(random_towers.pictures(1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "vit"}, "model_type 'vit'; a picture tower is one of clip, "),
        ({"model_type": "siglip2"}, r"siglip2 \(NaFlex"),
        ({"model_type": "clip_text_model"}, "a text tower alone"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"vision": {"hidden_act": "relu"}}, "activation 'relu' is not known"),
        ({"vision": {"num_channels": 1}}, "1 channels"),
        ({"vision": {"num_attention_heads": 5}}, "hidden 48 does not divide by 5 heads"),
        ({"vision": {"patch_size": [8, 8]}}, r"patch_size is \[8, 8\], a whole number"),
        ({"vision": {"num_hidden_layers": 10**12}}, "1000000000000 layers, at most 1000"),
        ({"projection_dim": 24.0}, "projection 24.0 of a clip tower"),
        ({"vision": {"patch_size": 41}}, "patches of 41 pixels do not fit pictures of 40"),
        (
            {"vision": {"patch_size": 10}},
            r"misshaped vision_model.embeddings.patch_embedding.weight \(48, 3, 8, 8\), config "
            r"wants \(48, 3, 10, 10\), misshaped .*position_embedding.weight \(26, 48\), config "
            r"wants \(17, 48\)",
        ),
        ({"vision": {"image_size": 48}}, r"position_embedding.weight \(26, 48\), config .*\(37, "),
        ({"vision": {"num_hidden_layers": 2}}, "unexpected .*layers.2.* and 8 more"),
        (
            {"vision": {"image_size": 45}},
            "its processor makes pictures of 40 x 40 pixels, its vision tower takes 45 x 45",
        ),
    ],
)
def test_configs_that_are_refused(values, said, folder):
    config = json.loads((folder / "config.json").read_text())
    inner = config["vision_config"] | values.pop("vision", {})
    change(folder / "config.json", vision_config=inner, **values)
    with pytest.raises(ValueError, match=said) as caught:
        embedder("clip", str(folder))
    assert "\n" not in str(caught.value)


def test_siglip_without_its_head_is_refused(folders, tmp_path):
    spoilt = shutil.copytree(folders / "siglip", tmp_path / "siglip")
    change(spoilt / "config.json", vision_use_head=False)
    with pytest.raises(ValueError, match="vision_use_head is false"):
        embedder("siglip", str(spoilt))


def test_tensors_that_are_missing_are_named(folder):
    whole = load_file(folder / "model.safetensors")
    lost = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    file = folder / "model.safetensors"
    save_file({name: value for name, value in whole.items() if name != lost}, file)
    with pytest.raises(ValueError, match=f"missing {lost}$"):
        embedder("clip", str(folder))
    save_file({name: value for name, value in whole.items() if "text_model" in name}, file)
    with pytest.raises(ValueError, match=r"a text tower alone \(\d+ tensors\)"):
        embedder("clip", str(folder))
    file.unlink()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        embedder("clip", str(folder))


def test_clip_without_its_projection_is_refused(tmp_path):
    original = random_towers.original("CLIPVisionModel")
    original.save(tmp_path)
    with pytest.raises(ValueError, match="missing visual_projection.weight; .*WithProjection"):
        embedder("clip", str(tmp_path))


def test_a_folder_is_of_the_kind_that_was_asked_for(folders):
    with pytest.raises(ValueError, match="siglip is a siglip model, not clip"):
        embedder("clip", str(folders / "siglip"))
    with pytest.raises(ValueError, match="clip is a clip model: .* embedded by clip"):
        embedder("qwen2_5_vl", str(folders / "clip"))
