"""Title and readable text of an HTML file, by the standard library's parser."""

import contextlib
import html.parser
import re

SILENT = {"script", "style", "noscript", "template", "svg", "head"}
BLOCKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figcaption",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav",
    "ol", "p", "pre", "section", "table", "td", "th", "tr", "ul",
}  # fmt: skip
PIECE = 1 << 20  # characters that are parsed at a time
MAX_OPEN = 2000  # characters at the end, behind a "<" that nothing closes, that are read as text
MAX_SILENT = 100  # elements without text, one in the other, that are told apart


def title_and_text(page: str) -> tuple[str, str]:
    """The <title> (or the first <h1>) and the text, blocks parted by empty lines. Never raises."""
    reader = _Reader()
    # The parser asserts on marked sections that it does not know; what it read so far stays.
    with contextlib.suppress(AssertionError):
        for begin in range(0, len(page), PIECE):
            reader.feed(page[begin : begin + PIECE])
            if reader.open() > PIECE and not reader.cdata_elem:
                break  # a tag or a comment of a megabyte has no end
        reader.feed("\n")  # or a last "R&D" keeps the text before it waiting for its semicolon
        # Closing takes an open tag for text and looks at it again from each of its "<" on: a
        # stranger's 80 KB of "<a " took 36 seconds. Browsers drop what is left open, too.
        if reader.open() <= MAX_OPEN:
            reader.close()
    title = _line("".join(reader.title)) or _line("".join(reader.heading))
    blocks = (_line(block) for block in "".join(reader.text).split("\x00"))
    return title, "\n\n".join(block for block in blocks if block)


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.heading: list[str] = []  # of the first h1
        self.text: list[str] = []  # blocks parted by NUL
        self._silent: list[str] = []
        self._in_title = False
        self._headings = 0  # h1 so far, the open one included
        self._in_heading = False

    def open(self) -> int:
        """Characters that wait for the end of a tag or a comment."""
        return len(self.rawdata) if self.rawdata.startswith("<") else 0

    def handle_starttag(self, tag, attrs):
        if tag == "title":
            self._in_title = not self._silent or self._silent[-1] == "head"
        elif tag in SILENT:
            if len(self._silent) < MAX_SILENT:
                self._silent.append(tag)
        elif tag == "body":
            self._silent.clear()  # a head that was never closed
        if tag in BLOCKS:
            self.text.append("\x00")
        if tag == "h1":
            self._headings += 1
            self._in_heading = True

    def handle_endtag(self, tag):
        if tag == "title":
            self._in_title = False
        elif tag in self._silent:
            while self._silent.pop() != tag:
                pass
        if tag in BLOCKS:
            self.text.append("\x00")
        if tag == "h1":
            self._in_heading = False

    def handle_data(self, data):
        data = data.replace("\x00", " ")
        if self._in_title:
            self.title.append(data)
        elif not self._silent:
            self.text.append(data)
            if self._in_heading and self._headings == 1:
                self.heading.append(data)
