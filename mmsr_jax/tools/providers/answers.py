"""Reading what a service answered, whatever it really is."""

import math
import os
import re
from typing import Any
from urllib.parse import urlsplit

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Hit
from mmsr_jax.tools.http import HttpError, HttpResponse
from mmsr_jax.tools.redact import redact

MAX_TEXT = 20_000  # characters of one field
MAX_URL = 4096
MAX_INLINE = 4 << 20  # of a `data:` URL, which is a whole thumbnail

_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def variable(name: str, service: str) -> str:
    """The name of an environment variable.

    Raises:
      ValueError: no such name can be; it is not shown, for it may be the key itself.
    """
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            f"the key of {service} is looked for in the environment: give a variable's name "
            "(letters, digits, _), never the key itself"
        )
    return name


def key(name: str, service: str) -> str:
    """A service's key, from the environment.

    Raises:
      ValueError: it is not set, or `name` is no variable's name.
    """
    value = optional_key(name, service)
    if not value:
        raise ValueError(
            f"the key of {service} is missing: put it into the environment variable {name}"
        )
    return value


def optional_key(name: str, service: str) -> str:
    """The same for a service that answers without a key too; "" when it is not set."""
    return os.environ.get(variable(name, service), "").strip()


def price(dollars: float, setting: str) -> float:
    """A price in US dollars.

    Raises:
      ValueError: below 0, infinite or no number: no budget could be kept with it.
    """
    if not 0 <= dollars < math.inf:
        raise ValueError(f"{setting} must be a number of US dollars from 0 on, not {dollars}")
    return dollars


def base_url(url: str, service: str) -> str:
    """A service's address without a trailing slash.

    Raises:
      ValueError: not http(s), no host, or a password or a query in it, which may be a key and
        would end up in the store and the run's folder.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname
    except ValueError:  # a broken IPv6 address or port
        good = False
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            f"the address of {service} must hold no user or password, and nothing after ? or #: "
            "keys come from the environment"
        )
    if not good:
        raise ValueError(f"the address of {service} must be http(s)://host..., not {redact(url)!r}")
    return url.rstrip("/")


def table(response: HttpResponse, service: str) -> dict[str, Any]:
    """The answer as a JSON object. ToolError "bad_response" when it is none."""
    kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind and "json" not in kind:
        raise ToolError("bad_response", f"{service} answered {kind[:60]}, not JSON")
    try:
        found = response.json()
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ToolError("bad_response", f"{service} answered no JSON object")
    return found


def entries(answer: dict[str, Any], name: str, service: str) -> list[dict[str, Any]]:
    """A list of objects in an answer; absent means empty. Entries of other kinds are left out."""
    found = answer.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise ToolError("bad_response", f"{service}: {name} is no list")
    return [entry for entry in found if isinstance(entry, dict)]


def text(entry: dict[str, Any], *names: str) -> str:
    """The first of these fields that holds text, else ""."""
    for name in names:
        value = entry.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()[:MAX_TEXT]
    return ""


def address(entry: dict[str, Any], *names: str) -> str:
    """The first of these fields that holds a URL, else "". Never cut: half a URL is none."""
    for name in names:
        value = entry.get(name)
        value = value.strip() if isinstance(value, str) else ""
        if 0 < len(value) <= (MAX_INLINE if value.startswith("data:") else MAX_URL):
            return value
    return ""


def links(found: list[dict[str, Any]], title: str, link: str, snippet: str) -> list[Hit]:
    """Hits with an http(s) link, each link once, in order."""
    hits: dict[str, Hit] = {}
    for entry in found:
        url = address(entry, link)
        if url.startswith(("http://", "https://")):
            hits.setdefault(url, Hit(text(entry, title) or url, url, text(entry, snippet)))
    return list(hits.values())


def said(error: ToolError) -> str:
    """What the service wrote with an error, in lower case; never to be shown or logged."""
    if not isinstance(error, HttpError):
        return ""
    return error.body.decode("utf-8", "replace").lower()
