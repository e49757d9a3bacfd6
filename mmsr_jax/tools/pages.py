"""What a page is to the tools, who reads it, and which bodies can be one."""

import dataclasses
from typing import Literal, Protocol

from mmsr_jax.tools.base import ToolError

HTML_TYPES = ("text/html", "application/xhtml+xml", "application/xml", "text/xml")
PDF_TYPES = ("application/pdf", "application/x-pdf")
TEXT_TYPES = ("text/plain", "text/markdown", "text/csv", "application/json")
UNTOLD_TYPES = ("", "application/octet-stream", "binary/octet-stream")  # the bytes must tell
ACCEPT = "text/html,application/xhtml+xml,application/pdf;q=0.9,text/plain;q=0.8,*/*;q=0.1"


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """How pages are read."""

    kind: Literal["local", "jina", "browser"] = "local"
    max_bytes: int = 8 << 20  # of a page, after decompression
    max_pages: int = 30  # of a PDF
    max_chars: int = 200_000  # of a page's text
    parsers: int = 2  # processes
    parser_memory: int = 1 << 30  # bytes of address space, each
    jina_url: str = "https://r.jina.ai/"
    jina_key_env: str = "JINA_API_KEY"  # a key is optional: without one Jina answers fewer calls
    browser_sandbox: bool = True  # Chromium's own; off only where it cannot start (root in Docker)


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page says."""

    url: str  # after redirects
    title: str
    text: str


class Reader(Protocol):
    """Reads pages.

    `read` takes at most `deadline` seconds and raises `ToolError`: the kinds of `Http.send`, and
    "no_text" for a page without words.
    """

    async def read(self, url: str, deadline: float) -> Page: ...

    async def close(self) -> None: ...


class PageParser(Protocol):
    """Makes text of a body, see `LocalReader.parse`."""

    async def parse(self, body: bytes, content_type: str, deadline: float) -> tuple[str, str]: ...

    async def close(self) -> None: ...


def charset(content_type: str) -> str:
    """The charset parameter of a Content-Type header, or nothing."""
    for part in content_type.split(";")[1:]:
        name, _, value = part.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip("\"'")[:40]
    return ""


def page_kind(body: bytes, content_type: str) -> str:
    """ "html", "pdf" or "text". ToolError "bad_response" for what is no page."""
    declared = content_type.partition(";")[0].strip().lower()
    start = body[:1024].lstrip()
    if start.startswith(b"%PDF-"):  # many servers call it something else
        return "pdf"
    if declared in HTML_TYPES:
        return "html"
    if declared in TEXT_TYPES:
        return "text"
    if declared in PDF_TYPES:
        raise ToolError("bad_response", "a PDF without a PDF's head")
    if declared in UNTOLD_TYPES and start[:256].lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    raise ToolError("bad_response", f"content type {declared[:60] or 'none'!r} is no page")
