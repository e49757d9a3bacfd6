"""Takes keys out of texts that people or models will read."""

import base64
import re
import urllib.parse
from collections.abc import Iterable

HIDDEN = "***"
_QUERY = re.compile(r"(\bhttps?://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", re.IGNORECASE)
_USER = re.compile(r"(\bhttps?://)[^\s/?#'\"<>]*@", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the secrets (as they are, URL-quoted, base64), URLs without their query."""
    for spelling in spellings(secrets):
        text = text.replace(spelling, HIDDEN)
    return _QUERY.sub(r"\1?" + HIDDEN, _USER.sub(r"\1" + HIDDEN + "@", text))


def redact_bytes(body: bytes, secrets: Iterable[str]) -> bytes:
    """`body` without the secrets; URLs keep their queries."""
    for spelling in spellings(secrets):
        body = body.replace(spelling.encode("utf-8", "replace"), HIDDEN.encode())
    return body


def spellings(secrets: Iterable[str]) -> list[str]:
    """Every form in which a server may echo a secret, longest first."""
    found = set()
    for secret in secrets:
        encoded = secret.encode("utf-8", "replace")
        found |= {
            secret,
            urllib.parse.quote(encoded, safe=""),
            urllib.parse.quote_plus(encoded),
            base64.b64encode(encoded).decode(),
        }
    return sorted(found - {""}, key=len, reverse=True)
