"""Reading what a service answered, whatever it really is."""

import os
from typing import Any
from urllib.parse import urlsplit

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Hit
from mmsr_jax.tools.http import HttpError, HttpResponse

MAX_TEXT = 20_000  # characters of one field


def key(variable: str, service: str) -> str:
    """A service's key, from the environment.

    Raises:
      ValueError: it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(
            f"the key of {service} is missing: put it into the environment variable {variable}"
        )
    return value


def base_url(url: str, service: str) -> str:
    """A service's address without a trailing slash.

    Raises:
      ValueError: not http(s), no host, or a password in it, which would end up in the store.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the address of {service} must be http(s)://host..., not {url!r}")
    if parts.username or parts.password:
        raise ValueError(
            f"the address of {service} must hold no user or password: keys come from the "
            "environment"
        )
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


def links(found: list[dict[str, Any]], title: str, link: str, snippet: str) -> list[Hit]:
    """Hits with an http(s) link, each link once, in order."""
    hits: dict[str, Hit] = {}
    for entry in found:
        url = text(entry, link)
        if url.startswith(("http://", "https://")):
            hits.setdefault(url, Hit(text(entry, title) or url, url, text(entry, snippet)))
    return list(hits.values())


def said(error: ToolError) -> str:
    """What the service wrote with an error, in lower case; never to be shown or logged."""
    if not isinstance(error, HttpError):
        return ""
    return error.body.decode("utf-8", "replace").lower()
