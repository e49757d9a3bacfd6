"""Pictures become public under a name of their own, whole, or not at all."""

import asyncio
import hashlib
import io
import os
import stat
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.pictures import reencode
from mmsr_jax.tools.upload import FolderUploader, UploadConfig, named, uploader


def picture(format="PNG", color="red"):
    out = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(out, format)
    return out.getvalue()


def test_a_folder_that_the_world_sees(tmp_path):
    config = UploadConfig(folder=str(tmp_path / "public"), base_url="https://a.example/p/")
    publish = uploader(config).publish

    async def main():
        return await asyncio.gather(*(publish(picture()) for _ in range(8)), publish(b"GIF89a..."))

    with pytest.raises(ToolError, match="bad_picture: it cannot be decoded"):
        asyncio.run(main())
    urls = asyncio.run(asyncio.wait_for(gather(publish, 8), 10))
    name = hashlib.sha256(reencode(picture())).hexdigest() + ".png"
    assert set(urls) == {f"https://a.example/p/{name}"}
    (file,) = (tmp_path / "public").iterdir()
    assert file.name == name and file.read_bytes() == reencode(picture())
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


async def gather(publish, count):
    return await asyncio.gather(*(publish(picture()) for _ in range(count)))


@pytest.mark.parametrize(
    ("given", "extension", "media"),
    [("JPEG", "jpg", "image/jpeg"), ("WEBP", "jpg", "image/jpeg"), ("PNG", "png", "image/png"),
     ("BMP", "png", "image/png"), ("TIFF", "png", "image/png")],
)  # fmt: skip
def test_what_is_published_is_a_plain_png_or_jpeg_named_by_its_content(given, extension, media):
    name, said, data = named(picture(given))
    assert said == media and name == f"{hashlib.sha256(data).hexdigest()}.{extension}"
    assert Image.open(io.BytesIO(data)).format == {"jpg": "JPEG", "png": "PNG"}[extension]


def test_nothing_but_pixels_becomes_public():
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    out = io.BytesIO()
    Image.new("RGB", (4, 3)).save(out, "JPEG", exif=exif)
    assert b"at home" in out.getvalue() and b"at home" not in named(out.getvalue())[2]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_start_programs_or_fill_the_memory_are_refused():
    with pytest.raises(ToolError, match="^bad_picture"):
        named(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    out = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(out, "TIFF", compression="group4")
    with pytest.raises(ToolError, match="^too_large"):
        named(out.getvalue())


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    publish = FolderUploader(str(tmp_path), "https://a.example").publish
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ToolError, match="^upload: cannot write there: No space left"):
        asyncio.run(publish(picture()))
    assert list(tmp_path.iterdir()) == []


def test_publishing_has_threads_of_its_own(tmp_path, monkeypatch):
    """Uploads that hang must not stop what else asks for a thread."""
    hold = threading.Event()
    monkeypatch.setattr(FolderUploader, "_publish", lambda self, picture: str(hold.wait(30)))

    async def main():
        publish = FolderUploader(str(tmp_path), "https://a.example").publish
        hanging = [asyncio.ensure_future(publish(b"")) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(hold.set), 20)
        await asyncio.gather(*hanging)

    asyncio.run(main())


def test_a_bucket_of_google_is_told_how_long_to_wait(monkeypatch):
    given = {}

    def files(url, **options):
        given[url] = options
        return None, "root"

    monkeypatch.setattr(fsspec.core, "url_to_fs", files)
    uploader(UploadConfig(bucket="gs://b"))
    uploader(UploadConfig(bucket="s3://b"))
    assert given == {"gs://b": {"requests_timeout": 10}, "s3://b": {}}


def test_a_folder_that_cannot_be_written_is_an_upload_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    publish = FolderUploader(str(tmp_path / "file"), "https://a.example").publish
    with pytest.raises(ToolError, match="^upload: cannot write there"):
        asyncio.run(publish(picture()))


class Signing(MemoryFileSystem):
    """A bucket in memory that signs URLs, as gcsfs and s3fs do."""

    protocol = "signing"
    store: dict = {}
    pseudo_dirs = [""]
    writes = 0

    def sign(self, path, expiration=100, **_):
        return f"https://bucket.example{path}?expires={expiration}&signature=abc"

    def pipe_file(self, path, value, mode="overwrite", **options):
        Signing.writes += 1
        super().pipe_file(path, value, mode)


class Refusing(Signing):
    protocol = "refusing"

    def exists(self, path, **_):
        raise OSError("no permission for key AKIA-SECRET")


fsspec.register_implementation("signing", Signing, clobber=True)
fsspec.register_implementation("refusing", Refusing, clobber=True)


def test_a_bucket_gives_signed_urls_and_is_written_once():
    publish = uploader(UploadConfig(bucket="signing://b/pictures", signed_seconds=60)).publish
    Signing.writes = 0
    first, second = asyncio.run(publish(picture())), asyncio.run(publish(picture()))
    digest = hashlib.sha256(reencode(picture())).hexdigest()
    assert first == second and f"/b/pictures/{digest}.png?expires=60&" in first
    again = uploader(UploadConfig(bucket="signing://b/pictures")).publish
    asyncio.run(again(picture()))
    assert Signing.writes == 1


def test_a_bucket_that_cannot_sign_or_refuses_is_an_upload_error():
    publish = uploader(UploadConfig(bucket="memory://b")).publish
    with pytest.raises(ToolError, match="upload: this file system cannot sign"):
        asyncio.run(publish(picture()))
    publish = uploader(UploadConfig(bucket="refusing://b")).publish
    with pytest.raises(ToolError, match="upload: the bucket refused: OSError") as raised:
        asyncio.run(publish(picture()))
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one uploader"),
        ({"folder": "x"}, "belong together"),
        ({"folder": "x", "base_url": "https://a", "bucket": "gs://b"}, "needs one uploader"),
        ({"folder": "x", "base_url": "a.example"}, "must be http"),
        ({"bucket": "b"}, "must be gs://"),
    ],
)
def test_settings_that_clash_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        uploader(UploadConfig(**options))


def test_a_missing_package_is_named(monkeypatch):
    def missing(url, **_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"gs:// needs another package.*mmsr-jax\[cloud\]"):
        uploader(UploadConfig(bucket="gs://b"))
