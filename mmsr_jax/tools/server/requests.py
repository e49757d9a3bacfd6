"""What may be asked of the server: bodies read up to a limit, fields checked, errors named."""

import base64
import binascii
import dataclasses
import json
from collections.abc import AsyncIterator


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    json_bytes: int = 1_000_000  # body of /retrieve
    picture_bytes: int = 20_000_000  # encoded picture of /image; as base64 a third more
    queries: int = 256  # of one /retrieve
    query_chars: int = 10_000
    topk: int = 100
    default_topk: int = 3

    def __post_init__(self):
        if not 1 <= self.default_topk <= self.topk:
            raise ValueError(f"default_topk {self.default_topk} must be in 1..{self.topk}")

    @property
    def picture_limit(self) -> int:
        """Bytes of the largest body of /image: the picture as base64 in JSON."""
        return self.picture_bytes * 4 // 3 + 10_000


class Refused(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        kind: one of few names, for programs; `message` is for people.
    """

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclasses.dataclass(frozen=True)
class Retrieve:
    """A body of /retrieve."""

    queries: tuple[str, ...]
    topk: int
    return_scores: bool


async def body(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    """The whole body. Refused (413) once there is more than `limit`, whatever was promised."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise Refused(413, "body_too_large", f"the body has more than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def retrieve(data: bytes, limits: Limits) -> Retrieve:
    """{"queries": [str, ...], "topk": int, "return_scores": bool}; the last two may be missing."""
    record = _object(data)
    queries = record.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise Refused(422, "bad_queries", "queries must be a list of strings")
    if not 1 <= len(queries) <= limits.queries:
        raise Refused(
            422, "bad_queries", f"{len(queries)} queries, 1 to {limits.queries} in one request"
        )
    longest = max(map(len, queries))
    if longest > limits.query_chars:
        raise Refused(
            422, "bad_queries", f"a query of {longest} characters, at most {limits.query_chars}"
        )
    scores = record.get("return_scores", False)
    if not isinstance(scores, bool):
        raise Refused(422, "bad_return_scores", "return_scores must be true or false")
    return Retrieve(tuple(queries), topk(record.get("topk"), limits), scores)


def picture(data: bytes, is_json: bool, asked: str | None, limits: Limits) -> tuple[bytes, int]:
    """The picture and how many results: of a JSON body {"image": base64, "topk": int}, or of a
    body that is the picture and a ?topk= in the address."""
    count: object = asked
    if is_json:
        record = _object(data)
        if not isinstance(record.get("image"), str):
            raise Refused(422, "bad_image", "image must be a string of base64")
        try:
            data = base64.b64decode(record["image"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(422, "bad_image", f"image is no base64: {error}") from None
        count = record.get("topk", asked)
    if isinstance(count, str):
        if not (count.isascii() and count.isdigit() and len(count) < 10):
            raise Refused(422, "bad_topk", "topk must be a whole number")
        count = int(count)
    if len(data) > limits.picture_bytes:
        raise Refused(413, "body_too_large", f"a picture of more than {limits.picture_bytes} bytes")
    return data, topk(count, limits)


def topk(asked: object, limits: Limits) -> int:
    """How many results; None is the server's default."""
    if asked is None:
        return limits.default_topk
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= limits.topk:
        raise Refused(422, "bad_topk", f"topk must be a whole number in 1..{limits.topk}")
    return asked


def _object(data: bytes) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_json", f"the body is no JSON: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise Refused(400, "bad_json", f"the body is a JSON {type(found).__name__}, no object")
    return found
