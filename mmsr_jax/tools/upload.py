"""Publishing pictures: Google Lens wants a URL that it can fetch, a dataset has bytes."""

import asyncio
import dataclasses
import hashlib
import io
import os
import pathlib
import tempfile
import time
from typing import Protocol
from urllib.parse import urlsplit

from PIL import Image

from mmsr_jax.tools.base import ToolError

TYPES = {"JPEG": ("jpg", "image/jpeg"), "PNG": ("png", "image/png"), "WEBP": ("webp", "image/webp")}
CLOUD = "pip install 'mmsr-jax[cloud]' brings it"


@dataclasses.dataclass(frozen=True)
class UploadConfig:
    """Where pictures become public. Either `folder` with `base_url`, or `bucket`."""

    folder: str = ""  # of a web server that shows it at base_url
    base_url: str = ""  # https://host/path
    bucket: str = ""  # gs://bucket/path or s3://bucket/path: URLs that are signed for a while
    signed_seconds: int = 3600  # how long a signed URL lives; a search takes seconds


class Uploader(Protocol):
    async def publish(self, picture: bytes) -> str:
        """A public URL that shows the picture. ToolError "upload" when there is none."""
        ...


def uploader(config: UploadConfig) -> Uploader:
    """The uploader that the config describes.

    Raises:
      ValueError: none, both, or half of one.
    """
    if bool(config.folder) != bool(config.base_url):
        raise ValueError("upload.folder and upload.base_url belong together: give both")
    if bool(config.folder) == bool(config.bucket):
        raise ValueError(
            "an image search by URL needs one uploader: upload.folder with upload.base_url, "
            "or upload.bucket"
        )
    if config.bucket:
        return BucketUploader(config.bucket, config.signed_seconds)
    return FolderUploader(config.folder, config.base_url)


async def publish(uploader: Uploader, picture: bytes, deadline: float) -> tuple[str, float]:
    """The URL that shows a picture, and the seconds that are left of `deadline`.

    Raises:
      ToolError: "timeout", or the uploader's "upload".
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            url = await uploader.publish(picture)
    except TimeoutError:
        raise ToolError("timeout", "the picture could not be published in time") from None
    return url, max(deadline - (time.monotonic() - began), 0.001)


def named(picture: bytes) -> tuple[str, str, bytes]:
    """A name by content, the media type and the bytes to publish; other formats become PNG.

    Raises:
      ToolError: "failed", the picture cannot be decoded.
    """
    digest = hashlib.sha256(picture).hexdigest()
    try:
        with Image.open(io.BytesIO(picture)) as image:
            if image.format not in TYPES:
                out = io.BytesIO()
                image.convert("RGB").save(out, "PNG")
                return f"{digest}.png", "image/png", out.getvalue()
            extension, media = TYPES[image.format]
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ToolError("failed", f"the picture cannot be decoded: {error}") from error
    return f"{digest}.{extension}", media, picture


class FolderUploader:
    """A folder that a web server shows to the world."""

    def __init__(self, folder: str, base_url: str):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"upload.base_url must be http(s)://host..., not {base_url!r}")
        self._folder, self._base = pathlib.Path(folder), base_url.rstrip("/")

    async def publish(self, picture: bytes) -> str:
        return await asyncio.to_thread(self._publish, picture)

    def _publish(self, picture: bytes) -> str:
        name, _, data = named(picture)
        target = self._folder / name
        if not target.exists():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                number, temporary = tempfile.mkstemp(dir=self._folder, prefix=".")
                with os.fdopen(number, "wb") as file:
                    file.write(data)
                os.chmod(temporary, 0o644)  # the web server is another user
                os.replace(temporary, target)  # nobody sees half a picture
            except OSError as error:
                raise ToolError("upload", f"cannot write there: {error.strerror}") from error
        return f"{self._base}/{name}"


class BucketUploader:
    """GCS or S3 through fsspec: the picture stays private, its URL is signed for a while."""

    def __init__(self, bucket: str, seconds: int):
        if "://" not in bucket:
            raise ValueError(f"upload.bucket must be gs://... or s3://..., not {bucket!r}")
        try:
            import fsspec
        except ImportError as error:
            raise ValueError(f"upload.bucket needs fsspec; {CLOUD}") from error
        protocol = bucket.partition("://")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(bucket)
        except ImportError as error:
            raise ValueError(f"{protocol}:// needs another package: {error}; {CLOUD}") from error
        self._seconds = seconds
        self._known: set[str] = set()  # what this process has written already

    async def publish(self, picture: bytes) -> str:
        return await asyncio.to_thread(self._publish, picture)

    def _publish(self, picture: bytes) -> str:
        name, media, data = named(picture)
        path = f"{self._root.rstrip('/')}/{name}"
        try:
            if path not in self._known:
                if not self._files.exists(path):
                    options = {"content_type": media} if self._takes_type() else {}
                    self._files.pipe_file(path, data, **options)
                self._known.add(path)
            return self._files.sign(path, expiration=self._seconds)
        except NotImplementedError as error:
            raise ToolError("upload", "this file system cannot sign URLs") from error
        except Exception as error:  # the services' own exceptions; their words may hold keys
            raise ToolError("upload", f"the bucket refused: {type(error).__name__}") from error

    def _takes_type(self) -> bool:
        protocol = self._files.protocol
        return "gs" in ((protocol,) if isinstance(protocol, str) else protocol)
