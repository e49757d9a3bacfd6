"""The language of search: what a response may ask for, what comes back, and the limits.

A response is free text that ends in one action:

    <reason>...</reason><search><img></search>                look the picture up
    <reason>...</reason><text_search>query</text_search>      search the web for words
    <reason>...</reason><answer>...</answer>                  answer, which ends the episode

Results come back as a user turn inside <information>...</information>. A `Protocol` holds every
message and limit, so that another dialect, or a published checkpoint's own prompts, is a JSON file.
"""

import dataclasses
import json
import pathlib
import re
import unicodedata
from collections.abc import Sequence

from mmsr_jax.types import Ending, Message, Picture, ToolResult

REASON, REASON_END = "<reason>", "</reason>"
IMAGE_SEARCH = "<search><img></search>"
TEXT_SEARCH, TEXT_SEARCH_END = "<text_search>", "</text_search>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
INFORMATION, INFORMATION_END = "<information>", "</information>"

MAX_QUERY_CHARS = 512  # longer ones are copied passages, and search services refuse them

_TAG = re.compile(r"<(/?(?:reason|search|img|text_search|answer|information))>")
_FIELD = re.compile(r"\{(picture|question|results|tool|error|n|title|link|text)\}")


@dataclasses.dataclass(frozen=True)
class ImageSearch:
    """Asks for pages that show the user's picture."""


@dataclasses.dataclass(frozen=True)
class TextSearch:
    """Asks for pages about a query (one line, not empty)."""

    query: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Ends the episode with an answer (may be empty)."""

    text: str


@dataclasses.dataclass(frozen=True)
class Malformed:
    """Neither a search nor an answer could be read."""

    why: str


Action = ImageSearch | TextSearch | Answer | Malformed


def parse(text: str) -> Action:
    """Reads the action of one whole response (special tokens already stripped).

    The action must end the response; white space after it is ignored. Whatever stands before it
    does not matter here: the format reward (`mmsr_jax.rewards.format`) judges that. Content runs
    from the last opening tag, over line breaks too.
    """
    text = text.strip()
    if not text:
        return Malformed("empty response")
    if text.endswith(IMAGE_SEARCH):
        return ImageSearch()
    if text.endswith(TEXT_SEARCH_END):
        query = _last_content(text, TEXT_SEARCH, TEXT_SEARCH_END)
        return Malformed(f"{TEXT_SEARCH_END} was never opened") if query is None else _query(query)
    if text.endswith(ANSWER_END):
        answer = _last_content(text, ANSWER, ANSWER_END)
        if answer is None:
            return Malformed(f"{ANSWER_END} was never opened")
        return Answer(answer.strip())
    for last in (TEXT_SEARCH, ANSWER):
        if last in text and last.replace("<", "</") not in text:
            return Malformed(f"{last} was never closed")
    for last in (IMAGE_SEARCH, TEXT_SEARCH_END, ANSWER_END):
        if last in text:
            return Malformed(f"text after {last}")
    return Malformed("no search and no answer")


def render(reason: str, action: ImageSearch | TextSearch | Answer) -> str:
    """Writes a well-formed response: the inverse of `parse`, for demonstrations."""
    match action:
        case ImageSearch():
            end = IMAGE_SEARCH
        case TextSearch(query):
            end = f"{TEXT_SEARCH}{query}{TEXT_SEARCH_END}"
        case Answer(text):
            end = f"{ANSWER}{text}{ANSWER_END}"
        case _:
            raise ValueError(f"no response says {action!r}")
    return f"{REASON}{reason}{REASON_END}{end}"


def _last_content(text: str, opening: str, closing: str) -> str | None:
    at = text.rfind(opening)
    return None if at < 0 else text[at + len(opening) : -len(closing)]


def _query(query: str) -> TextSearch | Malformed:
    if tag := _TAG.search(query):
        return Malformed(f"{tag.group()} inside the query")
    query = " ".join(query.split())  # line breaks and tabs are spaces to a search engine
    if not query:
        return Malformed("empty query")
    if len(query) > MAX_QUERY_CHARS:
        return Malformed(f"query of {len(query)} characters, at most {MAX_QUERY_CHARS}")
    for char in query:
        if unicodedata.category(char) in ("Cc", "Cs"):
            return Malformed(f"control character U+{ord(char):04X} in the query")
    return TextSearch(query)


_FIRST = """\
Answer a question about a picture. You may look things up before you answer.

Your tools:
- Picture search. Write <search><img></search> and you receive web pages that show the same or a \
similar picture, each with a small picture and its title. It takes no other input. Use it when you \
do not recognise what the picture shows.
- Text search. Write <text_search>your query</text_search> and you receive short extracts of web \
pages. Make the query specific and let it name what you are looking for: the search engine cannot \
see the picture.

How to respond:
1. Think first, inside <reason> and </reason>: what does the picture show, what does the question \
need, and do you know it for certain?
2. End with exactly one action, and write nothing after it: a picture search, a text search, or \
the answer in the form <answer>your answer</answer>.

Searching takes time, so search only for what you are not sure of. Results arrive between \
<information> and </information>. Keep the answer to the bare name, number or phrase that was \
asked for, for example <answer>Lisbon</answer>.

{picture}
Question: {question}"""

_AFTER_IMAGE = """\
Pages with the same or a similar picture, best match first:
<information>
{results}</information>
Question: {question}

Work out inside <reason> and </reason> which of these pages really match the picture, and what \
that says about the question. Then end with one action: <text_search>your query</text_search> if a \
fact is still missing, or <answer>your answer</answer>."""

_AFTER_TEXT = """\
Pages found for your query, best match first:
<information>
{results}</information>
Question: {question}

Work out inside <reason> and </reason> what these pages say about the question, and mind that some \
may be wrong or off the subject. Then end with <answer>your answer</answer>, kept to the bare \
name, number or phrase. If the pages do not settle it, give the answer you believe most likely."""

_AFTER_ERROR = """\
The {tool} brought no results ({error}). You may go on with what you know yourself.
Question: {question}

Think inside <reason> and </reason>, then end with <answer>your answer</answer>, or with another \
kind of search if it can help."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Limits and messages of an episode.

    Templates take {question}; `first` also {picture}, `after_image` and `after_text` {results},
    `after_error` {tool} and {error}; items take {n}, {title}, {link}, {text}, {picture}.
    An empty `system` means no system turn.
    """

    max_rounds: int = 3  # responses; a search asked for in the last one is not run
    image_searches: int = 1  # calls, failed ones included
    text_searches: int = 2
    max_result_items: int = 5
    max_title_chars: int = 200
    max_item_chars: int = 1200  # of one item's text, about 300 tokens
    system: str = "You are a helpful assistant."
    first: str = _FIRST
    after_image: str = _AFTER_IMAGE
    after_text: str = _AFTER_TEXT
    after_error: str = _AFTER_ERROR
    image_item: str = "{n}. {picture} {title}\n"
    text_item: str = "{n}. {link} {title}\n{text}\n"

    def __post_init__(self):
        lowest = dict.fromkeys(("max_rounds", "max_title_chars", "max_item_chars"), 1)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ValueError(
                    f"protocol.{field.name} must be {field.type.__name__}, got {value!r}"
                )
            if field.type is int and value < lowest.get(field.name, 0):
                raise ValueError(
                    f"protocol.{field.name} is {value}, at least {lowest.get(field.name, 0)} needed"
                )
        for name, needed in (
            ("first", ("{picture}", "{question}")),
            ("after_image", ("{results}",)),
            ("after_text", ("{results}",)),
        ):
            for field in needed:
                if (count := getattr(self, name).count(field)) != 1:
                    raise ValueError(f"protocol.{name} holds {field} {count} times, once needed")

    def first_message(self, question: str, picture: Picture) -> tuple[Message, ...]:
        """The conversation before the first response: system turn and round-1 message."""
        parts = _fill(self.first, {"question": question, "picture": picture})
        return Message("system", (self.system,)), Message("user", parts)

    def result_message(
        self, result: ToolResult, question: str, thumbnails: Sequence[Picture] = ()
    ) -> Message:
        """The user turn that shows a tool's result.

        Args:
            result: its items are shown as far as `max_result_items` and the lengths allow; an
                error, or no item at all, becomes a message that names it.
            question: the user's question, which templates may repeat.
            thumbnails: the pictures of those items that have a thumbnail, in order.

        Raises:
            ValueError: a tool that this protocol does not know.
        """
        if result.tool not in ("image_search", "text_search"):
            raise ValueError(f"tool {result.tool!r}: this protocol knows image_search, text_search")
        is_image = result.tool == "image_search"
        if result.error is not None or not result.items:
            values = {
                "tool": "picture search" if is_image else "text search",
                "error": _line(result.error or "no_results", 200),
                "question": question,
            }
            return Message("user", _fill(self.after_error, values))
        template = self.image_item if is_image else self.text_item
        pictures = iter(thumbnails)
        shown: list[str | Picture] = []
        for n, item in enumerate(result.items[: self.max_result_items], 1):
            picture = next(pictures, None) if item.thumbnail is not None else None
            values = {
                "n": str(n),
                "title": _line(item.title, self.max_title_chars),
                "link": _line(item.link, self.max_title_chars) or None,
                "text": _line(item.text, self.max_item_chars),
                "picture": picture,
            }
            shown += _fill(template, values)
        whole = self.after_image if is_image else self.after_text
        return Message("user", _fill(whole, {"question": question, "results": tuple(shown)}))

    def allowed(
        self, round: int, image_calls: int, text_calls: int, action: Action
    ) -> Ending | None:
        """How an episode ends with this action, or None when the search is to be run.

        Args:
            round: number of responses so far, the one with this action included (1, 2, ...).
            image_calls: picture searches already run, and text_calls: text searches.
        """
        if isinstance(action, Malformed):
            return Ending.MALFORMED
        if isinstance(action, Answer):
            return Ending.ANSWERED
        if round >= self.max_rounds:
            return Ending.TURN_LIMIT
        if isinstance(action, ImageSearch):
            used_up = image_calls >= self.image_searches
        else:
            used_up = text_calls >= self.text_searches
        return Ending.TOOL_BUDGET if used_up else None

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "Protocol":
        """Reads a file written by `to_json`; fields that it leaves out keep their defaults."""
        path = pathlib.Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"protocol file {path} does not exist") from None
        except ValueError as error:
            raise ValueError(f"protocol file {path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"protocol file {path} must hold one JSON object")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"protocol file {path}: unknown field {name!r}; known: {', '.join(known)}"
                )
        return cls(**values)

    def to_json(self, path: str | pathlib.Path) -> None:
        """Writes all fields as one JSON object."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def _fill(template: str, values: dict) -> tuple[str | Picture, ...]:
    """Puts values in place of {fields} in one pass, so that a value's own braces stay as they are.

    A value is text, a picture, a tuple of both, or None (the field and a space after it vanish).
    Neighbouring text is joined: the tokeniser must see it whole.
    """
    parts: list[str | Picture] = []

    def add(value):
        if isinstance(value, tuple):
            for inner in value:
                add(inner)
        elif isinstance(value, str) and parts and isinstance(parts[-1], str):
            parts[-1] += value
        elif value != "":
            parts.append(value)

    at = 0
    for match in _FIELD.finditer(template):
        if match.group(1) not in values or match.start() < at:
            continue
        add(template[at : match.start()])
        at = match.end()
        value = values[match.group(1)]
        if value is not None:
            add(value)
        elif template[at : at + 1] == " ":
            at += 1
    add(template[at:])
    return tuple(parts)


def _line(text: str, limit: int) -> str:
    """One line of at most `limit` characters of foreign text, cut between words.

    Line breaks could forge further items and our tags a further message, so both are disarmed.
    """
    text = " ".join(_TAG.sub(r"(\1)", text).split())
    if len(text) <= limit:
        return text
    head = text[:limit].rsplit(" ", 1)[0][: limit - 1]
    return head.rstrip(" ,;:") + "\N{HORIZONTAL ELLIPSIS}"


DEFAULT = Protocol()

# For small models trained from scratch on the embedded world: few tokens, no instructions.
SHORT = Protocol(
    max_result_items=3,
    system="",
    first="{picture}{question}",
    after_image="<information>{results}</information>",
    after_text="<information>{results}</information>",
    after_error="<information>{error}</information>",
    image_item="{n}. {picture} {title}\n",
    text_item="{n}. {title}: {text}\n",
)
