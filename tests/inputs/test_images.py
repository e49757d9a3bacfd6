import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmsr_jax.inputs import images
from mmsr_jax.inputs.images import ImageConfig

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    plain = mode if mode in CHANNELS else "L"
    count = width * height * CHANNELS[plain]
    image = Image.frombytes(plain, (width, height), rng.integers(0, 256, count, np.uint8).tobytes())
    if mode != plain:
        image = image.convert(mode)
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    return image


def reference(image, config: ImageConfig):
    processor = Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    )
    out = processor(images=image, return_tensors="np")
    return out["pixel_values"], tuple(int(n) for n in out["image_grid_thw"][0])


def assert_same(image, config: ImageConfig):
    patches, grid = images.preprocess(image, config)
    expected, expected_grid = reference(image, config)
    assert grid == expected_grid
    assert patches.dtype == np.float32 and patches.shape == expected.shape
    np.testing.assert_array_equal(patches, expected)


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SIZES = [
    (70, 98),
    (98, 70),
    (1, 1),
    (13, 200),
    (200, 1),
    (27, 29),
    (301, 57),
    (640, 427),
    (33, 500),
]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_bit_equal_to_the_original_in_every_mode(mode):
    for width, height in SIZES:
        assert_same(noise(mode, width, height), ImageConfig())


def test_bit_equal_with_a_transparent_palette():
    image = noise("P", 61, 45)
    image.info["transparency"] = 7
    assert_same(image, ImageConfig())


def test_bit_equal_with_other_sizes_of_patch_and_limit():
    for config in (
        ImageConfig(max_pixels=28 * 28 * 6, min_pixels=28 * 28),
        ImageConfig(patch_size=4, merge_size=2, min_pixels=64, max_pixels=24 * 24),
        ImageConfig(patch_size=8, merge_size=1, temporal_patch_size=1, min_pixels=64),
        ImageConfig(max_pixels=12845056),
    ):
        for width, height in [(24, 24), (50, 33), (199, 101), (1, 150)]:
            assert_same(noise("RGB", width, height), config)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 260),
    height=st.integers(1, 260),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "LA"]),
    seed=st.integers(0, 9),
)
def test_bit_equal_for_any_size(width, height, mode, seed):
    config = ImageConfig(max_pixels=28 * 28 * 40)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="200 times"):
            images.preprocess(noise(mode, width, height), config)
        return
    assert_same(noise(mode, width, height, seed), config)


def test_arrays_and_bytes_are_pictures_too():
    image = noise("RGB", 85, 60)
    expected, grid = images.preprocess(image, ImageConfig())
    for same in (np.asarray(image), png(image), bytearray(png(image, "BMP"))):
        patches, same_grid = images.preprocess(same, ImageConfig())
        assert same_grid == grid
        np.testing.assert_array_equal(patches, expected)
    grey = noise("L", 85, 60)
    expected, _ = images.preprocess(grey, ImageConfig())
    for same in (np.asarray(grey), np.asarray(grey)[..., None]):
        np.testing.assert_array_equal(images.preprocess(same, ImageConfig())[0], expected)
    assert_same(np.asarray(noise("RGBA", 31, 64)), ImageConfig())


def test_picture_is_a_record_with_a_stable_digest():
    one = images.picture(png(noise("RGB", 40, 30)), ImageConfig())
    two = images.picture(noise("RGB", 40, 30), ImageConfig())
    assert one.grid == (1, 4, 6)  # 40 x 30 grows to 84 x 56: at least min_pixels
    assert one.digest == two.digest


def test_rounding_is_half_to_even():
    assert images.target_size(98, 70, ImageConfig()) == (112, 56)


def test_photos_are_turned_upright():
    image = noise("RGB", 120, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = png(image, exif=exif)
    assert images.decode(data).size == (60, 120)


def test_sixteen_bit_grey_keeps_its_contrast():
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = images.decode(png(Image.fromarray(levels)))
    np.testing.assert_array_equal(np.asarray(image), (levels >> 8).astype(np.uint8))


def test_sixteen_bit_grey_is_turned_upright():
    levels = np.arange(60 * 120).astype(np.uint16).reshape(60, 120) * 9
    exif = Image.Exif()
    exif[0x0112] = 6
    image = images.decode(png(Image.fromarray(levels), exif=exif))
    turned = np.rot90(levels >> 8, -1).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image), turned)


def huge_png(width: int, height: int) -> bytes:
    """A header that promises more pixels than it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (png(noise("RGB", 64, 64))[:300], "broken"),
        (png(noise("RGB", 64, 64), "JPEG")[:300], "broken"),
        (png(noise("L", 1, 4000)), "200 times"),
        (png(noise("L", 4000, 1)), "200 times"),
        (huge_png(9500, 9500), "too large"),
        (huge_png(60000, 60000), "too large"),
        (huge_png(0, 5), "picture"),
    ],
)
def test_bad_pictures_are_one_clear_error(data, problem):
    with pytest.raises(ValueError, match=problem):
        images.decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_raise_value_error(data):
    good = bytearray(png(noise("RGB", 20, 20), data.draw(st.sampled_from(["PNG", "GIF", "TIFF"]))))
    for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
        good[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        images.preprocess(bytes(good), ImageConfig(max_pixels=28 * 28 * 40))


@pytest.mark.parametrize(
    "thing",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 40, 40), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(7, np.uint8),
        "flag.png",
    ],
)
def test_other_things_are_no_pictures(thing):
    with pytest.raises(ValueError, match="picture|pixels"):
        images.preprocess(thing, ImageConfig())


@pytest.mark.parametrize(
    "values",
    [{"min_pixels": 100, "max_pixels": 50}, {"patch_size": 0}, {"std": (1.0, 0.0, 1.0)}],
)
def test_bad_configs_are_refused(values):
    with pytest.raises(ValueError):
        ImageConfig(**values)


def test_config_to_hugging_face_and_back(tmp_path):
    config = ImageConfig(patch_size=8, max_pixels=5000, min_pixels=256)
    config.to_hf(tmp_path)
    assert ImageConfig.from_hf(tmp_path) == config
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = noise("RGB", 90, 70)
    patches, _ = images.preprocess(image, config)
    np.testing.assert_array_equal(processor(images=image)["pixel_values"], patches)


def test_config_from_both_generations_of_files(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"shortest_edge": 784, "longest_edge": 12845056}}))
    assert ImageConfig.from_hf(tmp_path) == ImageConfig(min_pixels=784, max_pixels=12845056)
    path.write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}))
    assert ImageConfig.from_hf(tmp_path).max_pixels == 12845056
    path.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(ValueError, match="CLIP"):
        ImageConfig.from_hf(tmp_path)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        ImageConfig.from_hf(tmp_path / "nothing")


SIZE = {"shortest_edge": 4000, "longest_edge": 30_000}


@pytest.mark.parametrize(
    "written",
    [
        {"size": SIZE},
        {"size": SIZE, "min_pixels": None, "max_pixels": None},  # as fast processors wrote it
        {"size": SIZE, "min_pixels": 5000, "max_pixels": None},
        {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 5000, "max_pixels": 20_000},
        {"size": None, "max_pixels": 20_000},
        {"size": SIZE, "patch_size": 7, "image_mean": [0.5, 0.4, 0.3]},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_means_what_it_means_to_the_original(written, nested, tmp_path):
    written = {"image_processor_type": "Qwen2VLImageProcessorFast"} | written
    if nested:  # the only file that transformers 5 writes; it goes before the other
        outer = {"image_processor": written, "processor_class": "Qwen2_5_VLProcessor"}
        (tmp_path / "processor_config.json").write_text(json.dumps(outer))
        written = {"min_pixels": 784, "max_pixels": 1000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    config, peer = ImageConfig.from_hf(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for image in (noise("RGB", 40, 30), noise("RGB", 300, 210)):
        expected = peer(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(images.preprocess(image, config)[0], expected)


@pytest.mark.parametrize(
    "written",
    [
        {"do_normalize": False},
        {"do_resize": None},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5},
        {"patch_size": "14"},
        {"patch_size": 0},
        {"size": 448},
        {"image_mean": [0.5, None, 0.5]},
        {"image_std": 1},
        [],
    ],
)
def test_a_file_with_other_steps_or_none_is_refused(written, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        ImageConfig.from_hf(tmp_path)


def test_a_tile_larger_than_its_picture_is_what_is_decoded():
    """An index folder's thumbnails come here as they are: 16 x 16 pixels may take 2 GB."""
    side, tile = 16, 9600
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    data = zlib.compress(bytes(64))
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    picture = b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + data
    with pytest.raises(ValueError, match="too large: 16 x 16 pixels, a tile has 92160000"):
        images.decode(picture)
