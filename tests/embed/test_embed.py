"""Pictures by the vision tower: alone as in a batch, and the mean of what the model itself sees."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from mmsr_jax.embed.qwen2_5_vl import VisionEmbedder, VisionEmbedderConfig
from mmsr_jax.inputs import images as image_inputs
from mmsr_jax.inputs.layout import vision_inputs
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.open import open_index
from mmsr_jax.weights import hf

SIZES = VisionEmbedderConfig(max_pixels=112 * 112, min_pixels=56 * 56, pictures=3, dtype="float32")


@pytest.fixture(scope="module")
def model(tiny):
    """Heads as wide as published configs have them: hidden / heads."""
    text = dataclasses.replace(tiny.model.text, head_dim=8, mrope_section=(2, 1, 1))
    return dataclasses.replace(tiny.model, text=text)


def weights(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = qwen.abstract(model)[1]
    return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    hf.save(weights(model), model, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def eyes(checkpoint):
    return VisionEmbedder(str(checkpoint), SIZES)


def pictures(count):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            tuple(int(side) for side in rng.integers(30, 300, 2))
        )
        for _ in range(count)
    ]


def test_alone_as_in_a_batch(eyes):
    shown = pictures(7)
    together = eyes.embed(shown)
    assert together.shape == (7, eyes.size) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([eyes.embed([image]) for image in shown])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert eyes.embed([]).shape == (0, eyes.size)


def test_it_is_the_mean_of_the_models_own_features(eyes, model):
    image = pictures(1)[0]
    config = image_inputs.ImageConfig(min_pixels=SIZES.min_pixels, max_pixels=SIZES.max_pixels)
    picture = image_inputs.picture(image, config)
    inputs = vision_inputs([picture], model.vision)
    graph = qwen.abstract(model)[0]
    features = np.asarray(qwen.encode_images(graph, weights(model), inputs))
    mean = features[: len(picture.patches) // 4].mean(0)
    np.testing.assert_allclose(eyes.embed([image])[0], mean / np.linalg.norm(mean), atol=2e-5)


def test_the_identity_follows_weights_and_sizes(eyes, checkpoint, model, tmp_path):
    assert VisionEmbedder(str(checkpoint), SIZES).identity == eyes.identity
    smaller = VisionEmbedderConfig(max_pixels=56 * 112, min_pixels=56 * 56, dtype="float32")
    assert VisionEmbedder(str(checkpoint), smaller).identity != eyes.identity
    hf.save(weights(model, 1), model, tmp_path / "other", dtype="float32")
    assert VisionEmbedder(str(tmp_path / "other"), SIZES).identity != eyes.identity


def test_an_index_by_the_tower(eyes, checkpoint, tmp_path):
    (tmp_path / "source").mkdir()
    for number, image in enumerate(pictures(5)):
        image.save(tmp_path / f"source/{number}.png")
    (tmp_path / "source/torn.png").write_bytes(b"torn")
    manifest, _ = build(tmp_path / "source", tmp_path / "out", IndexConfig(), eyes)
    assert manifest.pictures.embedder == "qwen2_5_vl" and manifest.pictures.pictures == 5
    assert manifest.pictures.weights == str(checkpoint)
    with open_index(tmp_path / "out", eyes) as index:
        for number in range(5):
            found = index.pictures.scored((tmp_path / f"source/{number}.png").read_bytes(), 2)
            assert found[0][0].title == str(number) and found[0][1] > found[1][1]
    with pytest.raises(ValueError, match="built with qwen2_5_vl .* cannot be searched with hash"):
        open_index(tmp_path / "out")
