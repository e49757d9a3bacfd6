"""`mmsr search`: the tools of the embedded world from the shell, and indices of one's own."""

import json
import pathlib

from mmsr_jax.cli import search_index, search_serve
from mmsr_jax.cli.endings import UsageError
from mmsr_jax.cli.words import Parser, printable
from mmsr_jax.types import ToolCall, ToolResult

EXAMPLE = 'mmsr search text "capital of Nepal"'
OTHERS = {"index": search_index, "serve": search_serve}


def run(words: list[str]) -> None:
    """One call through the toolbox that training uses; finding nothing is no error."""
    given = parser().parse(words)
    if given.tool in OTHERS:
        return OTHERS[given.tool].run(given)
    if given.count < 1:
        raise UsageError(f"--count must be at least 1, not {given.count}")
    result = _ask(_call(given), given.count)
    if result.error not in (None, "no_results"):
        raise UsageError(f"{result.tool}: {result.error}")
    if given.json:
        from mmsr_jax.report.record import result_record

        print(json.dumps(result_record(result), ensure_ascii=False))
    else:
        _print(result)


def parser() -> Parser:
    made = Parser("mmsr search", "Searches the embedded world of flags and countries.", EXAMPLE)
    tools = made.add_subparsers(dest="tool", metavar="text|image|index|serve", required=True)
    text = tools.add_parser(
        "text", prog="mmsr search text", description="Finds articles.", example=EXAMPLE
    )
    text.add_argument("query", metavar="QUERY", help="what to look for")
    image = tools.add_parser(
        "image",
        prog="mmsr search image",
        description="Finds the flags that look most like a picture.",
        example="mmsr search image photo.png --count 5",
    )
    image.add_argument("file", metavar="FILE", help="a picture: PNG, JPEG, ...")
    for tool in (text, image):
        tool.add_argument("--count", type=int, default=3, help="results (default: 3)")
        tool.add_argument("--json", action="store_true", help="one JSON object, with thumbnails")
    for other in OTHERS.values():
        other.add(tools)
    return made


def _call(given) -> ToolCall:
    if given.tool == "image":
        picture = pathlib.Path(given.file).read_bytes()
        return ToolCall("image_search", query="", image=picture, question="")
    if not given.query.strip():
        raise UsageError("the query is empty")
    return ToolCall("text_search", query=given.query, image=b"", question="")


def _ask(call: ToolCall, count: int) -> ToolResult:
    from mmsr_jax.data.flags.search import flags_tools
    from mmsr_jax.data.flags.world import World
    from mmsr_jax.tools.toolbox import Toolbox

    with Toolbox(flags_tools(World(), count, count)) as toolbox:
        return toolbox.submit(call).result()


def _print(result: ToolResult) -> None:
    if not result.items:
        print("no results")
    for number, item in enumerate(result.items, start=1):
        print(f"{number}. {printable(item.title)}  {printable(item.link)}".rstrip())
        if item.text:
            print(f"   {printable(item.text)}")
