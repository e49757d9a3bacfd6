"""Reads the body of a response: bounded, decompressed, and, if asked, as JSON."""

import json
import re
import zlib
from collections.abc import AsyncIterable

from mmsr_jax.tools.base import ToolError

ENCODINGS = "gzip, deflate"  # what we ask for; zlib can stop in the middle, others may not
MAX_MEMBERS = 64  # gzip files may be many files in a row
# Each chunk takes the event loop 12 microseconds, however small it is: 8 MB byte by byte would keep
# it for the whole deadline. No server means to send so many that are so small.
FREE_CHUNKS = 4096
LEAST_CHUNK = 32  # bytes, on average, of what has more chunks than these

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(
    chunks: AsyncIterable[bytes], encoding: str, length: str | None, limit: int
) -> bytes:
    """Reads raw chunks up to `limit` bytes, counted after decompression.

    Decompression stops at the limit, whatever the ratio: memory stays near `limit` plus a chunk.

    Args:
        encoding: Content-Encoding header.
        length: Content-Length header, if any.

    Raises:
        ToolError: "too_large"; "bad_response" for an encoding that was not asked for, or broken,
            and for crumbs.
    """
    inflate = _inflater(encoding)
    announced = int(length) if length and re.fullmatch("[0-9]{1,18}", length) else 0
    if inflate is None and announced > limit:
        raise _too_large(limit)
    body, taken, count = bytearray(), 0, 0
    async for chunk in chunks:
        taken, count = taken + len(chunk), count + 1
        if count > FREE_CHUNKS and taken < count * LEAST_CHUNK:
            raise ToolError("bad_response", f"{taken} bytes in {count} chunks")
        if taken > limit + 65_536:  # compressed data that yield nothing are no way around it
            raise _too_large(limit)
        body += chunk if inflate is None else inflate.feed(chunk, limit + 1 - len(body))
        if len(body) > limit:
            raise _too_large(limit)
    if inflate is not None and taken and not inflate.done:
        raise ToolError("bad_response", "the compressed body ends too early")
    return bytes(body)


def within(body: bytes, limit: int) -> bytes:
    """A body that is there already. ToolError "too_large" over the limit."""
    if len(body) > limit:
        raise _too_large(limit)
    return body


def parse_json(body: bytes, content_type: str) -> object:
    """The value of a JSON body; strings hold no lone surrogates, numbers are finite.

    Raises:
        ToolError: "bad_response" for another content type, or for what is no JSON.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind and not kind.endswith("json"):
        raise ToolError("bad_response", f"JSON expected, {kind[:60]} came")
    try:
        value = json.loads(body, parse_constant=_refuse)
        return _mended(value) if _SURROGATE.search(body) else value
    except RecursionError:
        raise ToolError("bad_response", "the JSON is nested too deeply") from None
    except ValueError:  # UnicodeDecodeError is one too
        raise ToolError("bad_response", f"broken JSON of {len(body)} bytes") from None


def _too_large(limit: int) -> ToolError:
    return ToolError("too_large", f"the body has more than {limit} bytes")


def _refuse(name: str) -> object:
    raise ValueError(name)


def _mended(value: object) -> object:
    """Lone surrogates, which no database or encoder takes, become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def _inflater(encoding: str) -> "_Inflater | None":
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip"):
        return _Inflater(16 + zlib.MAX_WBITS)
    if encoding == "deflate":
        return _Inflater(zlib.MAX_WBITS)
    raise ToolError("bad_response", f"content encoding {encoding[:40]!r} was not asked for")


class _Inflater:
    """Decompresses no more than it is asked for."""

    def __init__(self, bits: int):
        self._bits, self._members = bits, 1
        self._stream = zlib.decompressobj(bits)
        self._fed = False

    @property
    def done(self) -> bool:
        return self._stream.eof

    def feed(self, chunk: bytes, most: int) -> bytes:
        """At most `most` decompressed bytes; when fewer come, the chunk is used up."""
        out = bytearray()
        try:
            while chunk and len(out) < most:
                if self._stream.eof:
                    if self._bits <= zlib.MAX_WBITS or not chunk.strip(b"\0"):
                        break  # padding
                    self._members += 1
                    if self._members > MAX_MEMBERS:
                        raise ToolError("bad_response", f"more than {MAX_MEMBERS} gzip members")
                    self._stream = zlib.decompressobj(self._bits)
                out += self._decompress(chunk, most - len(out))
                chunk = self._stream.unused_data
        except zlib.error:
            raise ToolError("bad_response", "the compressed body is broken") from None
        return bytes(out)

    def _decompress(self, chunk: bytes, most: int) -> bytes:
        first, self._fed = not self._fed, True
        try:
            return self._stream.decompress(chunk, most)
        except zlib.error:
            if not first or self._bits != zlib.MAX_WBITS:
                raise
            # Some servers take "deflate" by its word and leave the zlib header away.
            self._bits = -zlib.MAX_WBITS
            self._stream = zlib.decompressobj(self._bits)
            return self._stream.decompress(chunk, most)
