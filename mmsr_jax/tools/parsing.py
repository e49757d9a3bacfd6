"""Page bytes -> text: HTML by trafilatura, PDF by pypdf. Runs as a program of its own.

Hostile pages can make a parser loop, eat memory or crash, so this file runs in a child process
that may be killed (`workers` starts it, by path: it imports nothing of this package). It reads
jobs from stdin and writes answers to stdout, each a length (8 bytes, big endian) and as many
bytes: a job is JSON and then the body, an answer is JSON.
"""

import codecs
import contextlib
import html
import io
import json
import os
import re
import struct
import sys
from collections.abc import Callable

MAX_TITLE_CHARS = 300

_TITLE = re.compile(r"<title[^>]{0,200}>(.{0,2000}?)</title", re.IGNORECASE | re.DOTALL)
_META = re.compile(rb"<meta[^>]{0,300}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.I)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Broken(Exception):
    """A page that gives no text: args are the error's kind and message."""


def parse(kind: str, body: bytes, charset: str, max_pages: int, max_chars: int) -> tuple[str, str]:
    """Title and text of a page.

    Args:
        kind: "html", "pdf" or "text".
        charset: what the Content-Type header said; may be empty, unknown or wrong.

    Raises:
        Broken: ("bad_response", why) or ("no_text", why).
    """
    if kind == "html":
        title, text = parse_html(body, charset)
    elif kind == "pdf":
        title, text = parse_pdf(body, max_pages, max_chars)
    else:
        title, text = "", decode(body, charset) or body.decode("utf-8", "replace")
    text = clean(text)[:max_chars].strip()
    if not text:
        raise Broken("no_text", f"no text in {len(body)} bytes of {kind}")
    return " ".join(clean(title).split())[:MAX_TITLE_CHARS], text


def parse_html(body: bytes, charset: str) -> tuple[str, str]:
    """The main text of a web page; where no main part can be told, all of its text."""
    import trafilatura

    page: str | bytes = decode(body, charset) or body  # undeclared: trafilatura guesses
    page = page.lstrip("\ufeff") if isinstance(page, str) else page
    text = trafilatura.extract(page, include_comments=False, include_tables=True)
    if not text:
        text = trafilatura.html2txt(page)
    if not text and isinstance(page, str) and "<" not in page:
        text = page  # somebody's plain text, called HTML
    start = page if isinstance(page, str) else body[:100_000].decode("latin-1")
    found = _TITLE.search(start[:100_000])
    return html.unescape(found[1]) if found else "", text or ""


def parse_pdf(body: bytes, max_pages: int, max_chars: int) -> tuple[str, str]:
    """The text of a PDF's first pages."""
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(body), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Broken("bad_response", "the PDF is locked with a password")
        texts, size = [], 0
        for number in range(min(len(reader.pages), max_pages)):
            texts.append(reader.pages[number].extract_text() or "")
            size += len(texts[-1])
            if size > max_chars:
                break
    except (Broken, MemoryError):
        raise
    except Exception as error:  # pypdf raises anything on broken files
        raise Broken("bad_response", f"the PDF is broken: {type(error).__name__}") from error
    title = ""
    with contextlib.suppress(Exception):
        title = str((reader.metadata and reader.metadata.title) or "")
    return title, "\n".join(texts)


def decode(body: bytes, charset: str) -> str | None:
    """The text of HTML bytes; None if it is not UTF-8 and nothing says what else it is."""
    marked = [name for bom, name in _BOMS if body.startswith(bom)]
    declared = _META.search(body[:4096])
    for name in [*marked, charset, declared[1].decode("ascii") if declared else ""]:
        try:
            known = codecs.lookup(name.strip("\"' ")).name if name else ""
            # As browsers do: pages that say Latin-1 mean Windows' superset of it.
            known = "cp1252" if known in ("iso8859-1", "ascii") else known
            if known and known != "utf-8":
                return body.decode(known, "replace")
        except (LookupError, ValueError):  # no such encoding, or none for text
            continue
        if known:
            return body.decode("utf-8", "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return None


def clean(text: str) -> str:
    """Text without control characters and lone surrogates; line breaks are newlines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text).encode("utf-8", "replace").decode("utf-8")


def answer(job: dict, body: bytes) -> dict:
    """What the parent is told about one job."""
    try:
        title, text = parse(job["kind"], body, job["charset"], job["max_pages"], job["max_chars"])
        return {"title": title, "text": text}
    except Broken as error:
        return {"error": error.args[0], "message": error.args[1]}
    except MemoryError:
        return {"error": "too_large", "message": "the page needs too much memory"}
    except RecursionError:
        return {"error": "bad_response", "message": "the page is nested too deeply"}
    except Exception as error:
        return {"error": "bad_response", "message": f"the parser failed: {type(error).__name__}"}


def confine(memory: int, seconds: float) -> None:
    """Limits this process: address space, no core files, and CPU time from now on."""
    try:
        import resource
    except ImportError:  # not on Windows; the parent's deadline still holds
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    limits = (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(used + seconds) + 2),  # even if the parent is gone
    )
    for which, value in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS has no address space limit
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def serve(take: Callable[[int], bytes], give: Callable[[bytes], object]) -> None:
    """Answers jobs until there are no more."""
    while len(head := take(8)) == 8:
        job = json.loads(take(struct.unpack(">Q", head)[0]))
        body = take(job["length"])
        confine(job["memory"], job["seconds"])
        reply = json.dumps(answer(job, body)).encode()
        give(struct.pack(">Q", len(reply)) + reply)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not get between the answers

    def give(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[answers.write(view) :]

    serve(sys.stdin.buffer.read, give)


if __name__ == "__main__":
    main()
