"""Pictures of a fixed size, bit for bit as the original's PIL processors make them."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmsr_jax.inputs.fixed_images import FixedImageConfig, fitted, pixels

SIZES = [(70, 98), (98, 70), (1, 1), (13, 200), (200, 1), (27, 29), (301, 57), (33, 500), (64, 64)]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    # A crop that is larger than one side, or both: odd differences either way.
    "clip, filled up": CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 41, "width": 64}
    ),
    "clip, not resized": CLIPImageProcessorPil(do_resize=False, crop_size=45),
    "clip, not normalised": CLIPImageProcessorPil(do_normalize=False),
    "clip, grey levels": CLIPImageProcessorPil(do_normalize=False, do_rescale=False),
    "clip, levels shifted": CLIPImageProcessorPil(do_rescale=False, image_mean=[9, 8, 7]),
    "siglip": SiglipImageProcessorPil(),
    "siglip, bilinear": SiglipImageProcessorPil(size={"height": 56, "width": 40}, resample=2),
    "siglip, Lanczos": SiglipImageProcessorPil(resample=1, rescale_factor=1 / 127.5),
}


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width + height)
    levels = rng.integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(levels, "RGBA").convert(mode)


@pytest.mark.parametrize("name", PROCESSORS)
def test_bit_equal_to_the_original(name, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    config = FixedImageConfig.from_hf(tmp_path)
    for width, height in SIZES:
        image = noise("RGB", width, height)
        (expected,) = PROCESSORS[name](images=image, return_tensors="np")["pixel_values"]
        found = pixels(image, config)
        assert found.shape == (3, *config.shape) and found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        levels = PROCESSORS[name](
            images=image, return_tensors="np", do_rescale=False, do_normalize=False
        )["pixel_values"][0]
        np.testing.assert_array_equal(fitted(image, config), levels.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_bit_equal_in_every_mode(mode, tmp_path):
    PROCESSORS["clip"].save_pretrained(tmp_path)
    image = noise(mode, 61, 45)
    (expected,) = PROCESSORS["clip"](images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels(image, FixedImageConfig.from_hf(tmp_path)), expected)


def test_ways_in_which_settings_are_written(tmp_path):
    def read(**values):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        return FixedImageConfig.from_hf(tmp_path)

    PROCESSORS["clip"].save_pretrained(tmp_path)
    whole = FixedImageConfig.from_hf(tmp_path)
    assert whole.shape == (224, 224) and whole.shortest == 224
    # What is not said is the class's own; numbers alone are of old files.
    assert read(image_processor_type="CLIPImageProcessor") == whole
    assert read(image_processor_type="CLIPImageProcessorFast") == whole
    assert read(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224) == whole
    assert read(image_processor_type="SiglipImageProcessor", size=[5, 6]).shape == (5, 6)
    # transformers 5 may keep a processor's parts in one file, which it then reads first.
    inner = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 7, "width": 7}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert FixedImageConfig.from_hf(tmp_path).shape == (7, 7)
    (tmp_path / "processor_config.json").write_text("{}")
    assert FixedImageConfig.from_hf(tmp_path).shape == (5, 6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "is for ViTImageProcessor, one of CLIP"),
        ({}, "is for None"),
        ({"do_pad": True}, "do_pad, which is not built"),
        ({"size": {"longest_edge": 5}}, "size of {'longest_edge': 5} is not built"),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, "only height and width, or shortest"),
        ({"do_center_crop": False}, "neither a crop nor a size of both sides"),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size .* needs height and width"),
        ({"size": {"shortest_edge": 100_000}}, "a shorter side of 100000 for a crop of"),
        ({"crop_size": {"height": 0, "width": 5}}, "side below 1"),
        ({"resample": 9}, "resample 9 is none of Pillow's"),
        ({"image_std": [1, 0, 1]}, "need 3 numbers, no 0"),
        ({"image_mean": [1, 2]}, "need 3 numbers"),
        ({"size": "large"}, "size of 'large'"),
    ],
)
def test_settings_that_are_refused(values, said, tmp_path):
    whole = {"image_processor_type": "CLIPImageProcessor"} | values if values else {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{said}"):
        FixedImageConfig.from_hf(tmp_path)


def test_no_settings_and_strips(tmp_path):
    with pytest.raises(ValueError, match="holds no preprocessor_config.json"):
        FixedImageConfig.from_hf(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no object"):
        FixedImageConfig.from_hf(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        FixedImageConfig.from_hf(tmp_path)
    PROCESSORS["siglip"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 x 201 pixels"):
        pixels(Image.new("RGB", (1, 201)), FixedImageConfig.from_hf(tmp_path))
