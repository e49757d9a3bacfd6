"""Web page -> text: through Jina Reader, or with our own HTTP client and parsers."""

import time

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.guard import Guard
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.pages import ACCEPT, Page, Reader, ReaderConfig, charset, page_kind
from mmsr_jax.tools.providers import answers
from mmsr_jax.tools.workers import Parsers


class LocalReader:
    """Fetches a page itself, past the address guard, and parses HTML, PDF and plain text."""

    provider = "web"

    def __init__(self, http: Http, config: ReaderConfig):
        self._http, self._config = http, config
        self._parsers = Parsers(config.parsers, config.parser_memory)

    async def read(self, url: str, deadline: float) -> Page:
        """The page's main text. ToolError: see `Reader`."""
        end = time.monotonic() + deadline
        response = await self._http.send(
            HttpRequest(
                self.provider,
                "GET",
                url,
                headers={"Accept": ACCEPT},
                deadline=deadline,
                max_bytes=self._config.max_bytes,
                public_only=True,
            )
        )
        declared = response.headers.get("content-type", "")
        title, text = await self.parse(response.body, declared, end - time.monotonic())
        return Page(response.url, title, text)

    async def parse(self, body: bytes, content_type: str, deadline: float) -> tuple[str, str]:
        """Title and text of a body. ToolError as `read`."""
        return await self._parsers.parse(
            page_kind(body, content_type),
            body,
            deadline=max(deadline, 0.0),
            charset=charset(content_type),
            max_pages=self._config.max_pages,
            max_chars=self._config.max_chars,
        )

    async def close(self) -> None:
        """Ends the parser processes."""
        await self._parsers.close()


class JinaReader:
    """Jina Reader (https://github.com/jina-ai/reader): GET {jina_url}{page}, JSON answer.

    Request headers: Authorization (Bearer), Accept, X-Timeout, X-Retain-Images.

    Raises:
        ValueError: a `jina_url` or `jina_key_env` that is none.
    """

    provider = "jina_reader"

    def __init__(self, http: Http, config: ReaderConfig):
        self._http, self._config = http, config
        self._url = answers.base_url(config.jina_url, "Jina Reader") + "/"
        self._key = ""
        if config.jina_key_env:
            self._key = answers.optional_key(config.jina_key_env, "Jina Reader")
        self._guard = Guard()  # Jina would not reach our machines, but need not hear of them

    async def read(self, url: str, deadline: float) -> Page:
        """The page as Markdown. ToolError: see `Reader`."""
        page = self._guard.read(url).url
        headers = {
            "Accept": "application/json",
            "X-Timeout": str(max(1, int(deadline) - 1)),
            "X-Retain-Images": "none",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        response = await self._http.send(
            HttpRequest(
                self.provider,
                "GET",
                self._url + page,
                headers=headers,
                deadline=deadline,
                max_bytes=self._config.max_bytes,
                secrets=(self._key,) if self._key else (),
            )
        )
        answer = response.json()
        data = answer.get("data", answer) if isinstance(answer, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("content"), str):
            raise ToolError("bad_response", "Jina's answer has no data.content")
        text = data["content"][: self._config.max_chars].strip()
        if not text:
            raise ToolError("no_text", "Jina found no text")
        title, final = data.get("title"), data.get("url")
        return Page(
            final if isinstance(final, str) and final else page,
            title if isinstance(title, str) else "",
            text,
        )

    async def close(self) -> None:
        """Nothing to end."""


def make_reader(http: Http, config: ReaderConfig) -> Reader:
    """The reader that a config names.

    Raises:
        ValueError: "browser" without Playwright; as `JinaReader`.
    """
    if config.kind == "jina":
        return JinaReader(http, config)
    if config.kind == "browser":
        from mmsr_jax.tools.browser import BrowserReader

        return BrowserReader(http, config, LocalReader(http, config))
    return LocalReader(http, config)
