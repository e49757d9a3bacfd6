"""Pictures become public under a name of their own, whole, or not at all."""

import asyncio
import hashlib
import io
import stat

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from mmsr_jax.tools.base import ToolError
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

    with pytest.raises(ToolError, match="failed: the picture cannot be decoded"):
        asyncio.run(main())
    urls = asyncio.run(asyncio.wait_for(gather(publish, 8), 10))
    name = hashlib.sha256(picture()).hexdigest() + ".png"
    assert set(urls) == {f"https://a.example/p/{name}"}
    (file,) = (tmp_path / "public").iterdir()
    assert file.name == name and file.read_bytes() == picture()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


async def gather(publish, count):
    return await asyncio.gather(*(publish(picture()) for _ in range(count)))


def test_formats_that_lens_may_not_know_become_png():
    for format, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = picture(format)
        assert named(data)[0].endswith(extension) and named(data)[2] == data
    name, media, data = named(picture("BMP"))
    assert name.endswith(".png") and media == "image/png"
    assert Image.open(io.BytesIO(data)).format == "PNG"


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
    digest = hashlib.sha256(picture()).hexdigest()
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
    def missing(url):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"gs:// needs another package.*mmsr-jax\[cloud\]"):
        uploader(UploadConfig(bucket="gs://b"))
