"""Pictures from outside: what comes out is a plain picture of bounded size, or a named error."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mmsr_jax.tools import local
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.decoders import web_formats
from mmsr_jax.tools.pictures import PictureLimits, reencode


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def stripes(width=300, height=200):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (200, 20, 30)
    pixels[:, width // 2 :] = (0, 40, 160)
    return Image.fromarray(pixels)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def png_that_claims(width, height):
    """A PNG of a few bytes whose head speaks of this many pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", web_formats())
def test_every_format_of_the_web_comes_out_plain(kind):
    data = encoded(stripes(), kind)
    out = reencode(data)
    image = opened(out)
    assert image.format == ("JPEG" if kind in ("JPEG", "WEBP", "AVIF") else "PNG")
    assert image.mode == "RGB" and image.size == (300, 200)
    left, right = image.getpixel((50, 100)), image.getpixel((250, 100))
    assert np.abs(np.subtract(left, (200, 20, 30))).max() < 25
    assert np.abs(np.subtract(right, (0, 40, 160))).max() < 25
    assert reencode(data) == out  # the store keys pictures by their content


def test_large_pictures_become_small_and_small_ones_stay():
    limits = PictureLimits(max_side=100)
    assert opened(reencode(encoded(stripes(1000, 250), "JPEG"), limits)).size == (100, 25)
    assert opened(reencode(encoded(stripes(1000, 10), "PNG"), limits)).size == (100, 1)
    assert opened(reencode(encoded(stripes(30, 20), "PNG"), limits)).size == (30, 20)


def test_nothing_but_pixels_survives():
    exif = Image.Exif()
    exif[0x010E] = "a secret description"
    exif[0x0112] = 6  # turned by 90 degrees
    profile = b"\0" * 36 + b"acsp" + b"profile" * 20
    data = encoded(stripes(), "JPEG", exif=exif, comment=b"a comment", icc_profile=profile)
    data += b"<script>trailer</script>"
    out = reencode(data)
    image = opened(out)
    assert image.size == (200, 300) and not image.getexif()
    for word in (b"secret", b"comment", b"script", b"profile"):
        assert word in data and word not in out
    text = Image.new("RGB", (4, 4))
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "secret")
    assert b"secret" not in reencode(encoded(text, "PNG", pnginfo=info))


def test_modes():
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        assert opened(reencode(encoded(Image.new(mode, (5, 4)), "PNG"))).mode == "RGB"
    for mode in ("CMYK", "F", "I", "LAB"):
        assert opened(reencode(encoded(Image.new(mode, (5, 4)), "TIFF"))).mode == "RGB"
    clear = Image.new("RGBA", (5, 4), (255, 0, 0, 0))
    assert opened(reencode(encoded(clear, "PNG"))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 30_000, 60_000]], np.uint16))
    found = opened(reencode(encoded(deep, "PNG")))
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(reencode(data)).getpixel((4, 4))[0] > 200


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "bad_picture: it cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "bad_picture"),
        (b"P6 2 2 255 " + bytes(12), "bad_picture"),
        (encoded(stripes(32, 32), "ICO"), "bad_picture"),
        (encoded(stripes(), "PNG")[:120], "bad_picture"),
        (encoded(stripes(), "JPEG")[:600], "bad_picture"),
        (png_that_claims(100_000, 100_000), "too_large"),
        (png_that_claims(30_000, 30_000), "too_large"),
        (png_that_claims(8000, 8000), "too_large: a picture of 8000 x 8000 pixels"),
        (png_that_claims(0, 5), "bad_picture"),
        (png_that_claims(60, 60), "bad_picture"),
        (encoded(stripes(1000, 4), "PNG"), "bad_picture: 1000 x 4 pixels are a line"),
        (bytes(11 << 20), "too_large: a picture of 11534336 bytes"),
    ],
)
def test_the_rest_has_a_name(data, text):
    with pytest.raises(ToolError) as caught:
        reencode(data)
    assert str(caught.value).startswith(text)


def test_no_decoder_that_starts_programs():
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} <= set(web_formats())
    assert not {"EPS", "PPM", "ICO", "FITS", "WMF"} & set(web_formats())


def test_no_filter_of_warnings_is_touched(monkeypatch):
    """`catch_warnings` in several threads leaves the process with one of their filters."""

    def never(*_, **__):
        raise AssertionError("threads share the filters")

    monkeypatch.setattr(warnings, "catch_warnings", never)
    monkeypatch.setattr(warnings, "simplefilter", never)
    assert opened(reencode(encoded(stripes(), "PNG"))).size == (300, 200)


def test_limits_that_are_none():
    with pytest.raises(ValueError, match="max_side must be at least 1, not 0"):
        PictureLimits(max_side=0)
    with pytest.raises(ValueError, match="quality must be from 1 to 95, not 96"):
        PictureLimits(quality=96)


def tiled(side: int, tile: int) -> bytes:
    """A TIFF of `side` x `side` pixels, grey, in one black tile of `tile` x `tile`."""
    data = zlib.compress(bytes(tile * tile), 9)
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + data


def test_a_tile_larger_than_its_picture_counts():
    """16 x 16 pixels in a tile of 2 GB: what is decoded is the tile."""
    limits = PictureLimits(max_pixels=250_000)
    assert opened(reencode(tiled(16, 496), limits)).size == (16, 16)
    with pytest.raises(
        ToolError, match="too_large: a picture of 16 x 16 pixels, a tile has 262144"
    ):
        reencode(tiled(16, 512), limits)
    with pytest.raises(ToolError, match="16 x 16 pixels, at most 250000, a tile has 262144"):
        local.load(tiled(16, 512), 250_000)


def test_a_picture_that_is_decoded_before_it_says_its_size_is_none():
    data = encoded(stripes(32, 32), "PNG")
    icon = b"\0\0\1\0\1\0" + struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(data), 22) + data
    for take in (reencode, local.load):
        with pytest.raises(ToolError, match="cannot be decoded"):
            take(icon)
