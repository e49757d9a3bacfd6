"""Publishing pictures: Google Lens wants a URL that it can fetch, a dataset has bytes."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.pictures import PictureLimits, reencode
from mmsr_jax.tools.providers import answers

# What the world may see: pixels, no place and no camera. Lens looks at far smaller pictures.
PUBLISHED = PictureLimits(max_bytes=32 << 20, max_side=2048)
THREADS = 4  # pictures decoded or written at the same time; decoded ones are large
PATIENCE = 10  # seconds of silence that GCS may keep; threads cannot be cancelled
CLOUD = "pip install 'mmsr-jax[cloud]' brings it"


@dataclasses.dataclass(frozen=True)
class UploadConfig:
    """Where pictures become public. Either `folder` with `base_url`, or `bucket`."""

    folder: str = ""  # of a web server that shows it at base_url
    base_url: str = ""  # https://host/path
    bucket: str = ""  # gs://bucket/path or s3://bucket/path: URLs that are signed for a while
    signed_seconds: int = 3600  # how long a signed URL lives; a search takes seconds

    def __post_init__(self):
        if self.base_url:
            answers.base_url(self.base_url, "upload.folder's web server")


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
    """A name by content, the media type and the bytes to publish: the picture encoded anew.

    Raises:
      ToolError: "too_large", or "bad_picture" for what cannot be decoded, see `reencode`.
    """
    data = reencode(picture, PUBLISHED)
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"{hashlib.sha256(data).hexdigest()}.{kind.replace('e', '')}", f"image/{kind}", data


@functools.cache
def _threads() -> concurrent.futures.Executor:
    # Its own: a bucket that hangs must not use up those of other work.
    return concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="publish")


async def _in_thread(work: Callable[[bytes], str], picture: bytes) -> str:
    return await asyncio.get_running_loop().run_in_executor(_threads(), work, picture)


class FolderUploader:
    """A folder that a web server shows to the world."""

    def __init__(self, folder: str, address: str):
        self._folder = pathlib.Path(folder)
        self._base = answers.base_url(address, "upload.folder's web server")

    async def publish(self, picture: bytes) -> str:
        return await _in_thread(self._publish, picture)

    def _publish(self, picture: bytes) -> str:
        name, _, data = named(picture)
        target = self._folder / name
        if not target.exists():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                number, temporary = tempfile.mkstemp(dir=self._folder, prefix=".")
                try:
                    with os.fdopen(number, "wb") as file:
                        file.write(data)
                    os.chmod(temporary, 0o644)  # the web server is another user
                    os.replace(temporary, target)  # nobody sees half a picture
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                    raise
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
            self._files, self._root = fsspec.core.url_to_fs(bucket, **_patience(protocol))
        except ImportError as error:
            raise ValueError(f"{protocol}:// needs another package: {error}; {CLOUD}") from error
        self._seconds = seconds
        self._known: set[str] = set()  # what this process has written already

    async def publish(self, picture: bytes) -> str:
        return await _in_thread(self._publish, picture)

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


def _patience(protocol: str) -> dict[str, Any]:
    """gcsfs waits for ever unless told otherwise; s3fs has 5 and 15 seconds by itself."""
    if protocol in ("gs", "gcs"):
        return {"requests_timeout": PATIENCE}
    return {}
