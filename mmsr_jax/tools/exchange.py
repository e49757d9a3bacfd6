"""What goes into the HTTP client and what comes out: request, response, error."""

import dataclasses
from collections.abc import Mapping

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.body import parse_json
from mmsr_jax.tools.redact import redact, redact_bytes
from mmsr_jax.tools.retry import retry_after

STATUS_KINDS = {401: "unauthorized", 402: "quota", 403: "unauthorized", 429: "rate_limited"}
RETRIED = frozenset({429, 500, 502, 503, 504})
MAX_ERROR_BODY = 4096  # bytes of an error's body that are kept
MAX_EXCERPT = 160  # characters of it that are shown


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """One call. `secrets` never appear in an error or a log, whoever echoes them."""

    provider: str
    method: str
    url: str = dataclasses.field(repr=False)  # this and what follows may hold a key
    params: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)  # added to `url`
    headers: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)
    json: object | None = dataclasses.field(default=None, repr=False)
    deadline: float = 30.0  # seconds for everything: waiting, retries, redirects, the body
    max_bytes: int | None = None  # None: the client's
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    public_only: bool = False  # a stranger wrote the URL: public addresses only, see `guard`


@dataclasses.dataclass(frozen=True)
class HttpResponse:
    """A 2xx response, its body read and decompressed."""

    status: int
    headers: Mapping[str, str] = dataclasses.field(repr=False)  # names in lower case
    body: bytes = dataclasses.field(repr=False)
    url: str = dataclasses.field(repr=False)  # after redirects; without secrets and their queries

    def json(self) -> object:
        """The body as JSON. ToolError "bad_response" when it is none, or says it is none."""
        return parse_json(self.body, self.headers.get("content-type", ""))


class HttpError(ToolError):
    """A `ToolError` that knows what the server said, for providers whose words say more."""

    def __init__(
        self,
        kind: str,
        message: str = "",
        status: int | None = None,
        body: bytes = b"",
        retry_after: float | None = None,
    ):
        super().__init__(kind, message)
        self.message = message
        self.status = status  # None: no response came
        self.body = body  # its first kilobytes, without the request's secrets
        self.retry_after = retry_after  # seconds that the server asked for
        self.again = status in RETRIED  # another try may help


def failure(
    status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...], show: bool
) -> HttpError:
    """The error that a status stands for; `show`: with a few words of the body in its text."""
    body = redact_bytes(body, secrets)  # before anything is cut: half a key is a key's half
    shown = _excerpt(body) if show and "html" not in headers.get("content-type", "") else ""
    kind = STATUS_KINDS.get(status, "server_error" if status >= 500 else "bad_response")
    wait = retry_after(headers.get("retry-after"), headers.get("date"))
    return HttpError(kind, f"HTTP {status}{shown}", status, body[:MAX_ERROR_BODY], wait)


def _excerpt(body: bytes) -> str:
    """The first words of an error's body, as they follow a status."""
    # Not of all of it: looking for addresses takes time that grows with the square of a text that
    # is made for it, and the event loop waits.
    said = body[:MAX_ERROR_BODY].decode("utf-8", "replace").split()
    if said and len(body) > MAX_ERROR_BODY:  # the last word may end in half an address
        head, mark, _ = said[-1].rpartition("://")
        said[-1] = head if mark else said[-1]
    words = redact(" ".join(said))
    words = "".join(char for char in words if char.isprintable())[:MAX_EXCERPT]
    return f": {words}" if words else ""


def cleaned(error: ToolError, secrets: tuple[str, ...]) -> HttpError:
    """The same error as an `HttpError` in which none of the secrets stands."""
    if not isinstance(error, HttpError):
        message = str(error).removeprefix(error.kind).removeprefix(": ")
        return HttpError(error.kind, redact(message, secrets))
    clean = HttpError(error.kind, redact(error.message, secrets), error.status)
    clean.body, clean.retry_after, clean.again = error.body, error.retry_after, error.again
    return clean
