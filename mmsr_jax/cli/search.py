"""`mmsr search`: the search tools from the shell, and indices of one's own."""

import json
import pathlib
import time

from mmsr_jax.cli import search_index, search_serve, search_store
from mmsr_jax.cli.endings import UsageError
from mmsr_jax.cli.words import Parser, printable
from mmsr_jax.types import ToolCall

EXAMPLE = 'mmsr search text "capital of Nepal"'
FLAGS = "flags"  # the embedded world
TEXTS = ("serper", "serpapi", "searxng", "jina", "retriever")
IMAGES = ("serper", "serpapi", "retriever")
OTHERS = {"store": search_store, "index": search_index, "serve": search_serve}


def run(words: list[str]) -> None:
    """One call through the tools that training uses; finding nothing is no error."""
    given = parser().parse(words)
    if given.tool in OTHERS:
        return OTHERS[given.tool].run(given)
    if given.count < 1:
        raise UsageError(f"--count must be at least 1, not {given.count}")
    call = _call(given)
    found, error, seconds = _ask(call, given)
    if error not in (None, "no_results"):
        raise UsageError(f"{call.tool}: {error}")
    if given.json:
        print(json.dumps(_record(call.tool, found, error, seconds), ensure_ascii=False))
    else:
        _print(found, seconds)


def parser() -> Parser:
    made = Parser("mmsr search", "Searches the embedded world, or the web.", EXAMPLE)
    tools = made.add_subparsers(dest="tool", metavar="text|image|store|index|serve", required=True)
    text = tools.add_parser(
        "text", prog="mmsr search text", description="Finds pages or articles.", example=EXAMPLE
    )
    text.add_argument("query", metavar="QUERY", help="what to look for")
    text.add_argument("--question", default="", help="what summaries are for (default: QUERY)")
    text.add_argument("--unread", action="store_true", help="show snippets, read no page")
    image = tools.add_parser(
        "image",
        prog="mmsr search image",
        description="Finds pages with pictures that look like one.",
        example="mmsr search image photo.png --count 5",
    )
    image.add_argument("file", metavar="FILE", help="a picture: PNG, JPEG, ...")
    for tool, names in ((text, TEXTS), (image, IMAGES)):
        tool.add_argument("--count", type=int, default=3, help="results (default: 3)")
        tool.add_argument("--json", action="store_true", help="one JSON object, with thumbnails")
        tool.add_argument(
            "--provider", choices=(FLAGS, *names), help=f"who is asked (default: {FLAGS})"
        )
        tool.add_argument("--index", default="", help="an index folder of your own is asked")
        tool.add_argument("--url", default="", help="of the provider, when it is your own machine")
        tool.add_argument("--config", default="", help="a config file whose tools are used")
        tool.add_argument(
            "--store", default="", help="a file that keeps answers and is asked first"
        )
        tool.add_argument("--replay", action="store_true", help="ask the store only")
    for other in OTHERS.values():
        other.add(tools)
    return made


def _call(given) -> ToolCall:
    if given.tool == "image":
        picture = pathlib.Path(given.file).read_bytes()
        return ToolCall("image_search", query="", image=picture, question="")
    if not given.query.strip():
        raise UsageError("the query is empty")
    question = given.question or given.query
    return ToolCall("text_search", query=given.query, image=b"", question=question)


def _tools(given) -> dict:
    """The tools' configuration as `assemble` takes it: of --config, changed by the other flags."""
    from dataclasses import replace

    from mmsr_jax.cli import config
    from mmsr_jax.tools.assembly import WebConfig
    from mmsr_jax.tools.budget import BudgetConfig
    from mmsr_jax.tools.index.open import FolderConfig
    from mmsr_jax.tools.store import StoreConfig

    # Not the experiment's record, unless it is asked for: that brings jax, which takes seconds.
    backend, folder, web, store = "local", FolderConfig(), WebConfig(), StoreConfig()
    budget, deadline = BudgetConfig(), 30.0
    if given.config:
        tools = config.load(given.config).tools
        backend, web, store, budget = tools.backend, tools.web, tools.store, tools.budget
        deadline, folder = tools.deadline, tools.index
    if given.index:
        if given.provider:
            raise UsageError("--index and --provider name two who are asked: give one")
        backend, folder = "index", replace(folder, folder=given.index)
    elif given.provider == FLAGS:
        backend = "local"
    elif given.provider:
        backend, web = "web", replace(web, **{given.tool: given.provider})
    if given.url:
        if given.provider in (None, FLAGS):
            raise UsageError("--url is the address of a provider: give --provider too")
        service = replace(getattr(web, given.provider), url=given.url)
        web = replace(web, **{given.provider: service})
    if getattr(given, "unread", False):
        web = replace(web, read=False)
    if given.store:
        store = replace(store, path=given.store)
    if given.replay:
        store = replace(store, mode="replay")
    return {
        "backend": backend, "index": folder, "web": web, "store": store, "budget": budget,
        "deadline": deadline, "image_results": given.count, "text_results": given.count,
    }  # fmt: skip


def _ask(call: ToolCall, given):
    """(Found or None, the error's name or None, seconds)."""
    from dataclasses import asdict

    from mmsr_jax.data.flags.search import flags_tools
    from mmsr_jax.data.flags.world import FlagsConfig, World
    from mmsr_jax.embed.folder import open_folder
    from mmsr_jax.tools.assembly import assemble
    from mmsr_jax.tools.toolbox import Toolbox

    tools = _tools(given)
    folder = tools.pop("index")
    counts = {"image_results": given.count, "text_results": given.count}
    search = assemble(
        **tools,
        local=lambda: flags_tools(World(), given.count, given.count),
        local_identity={"world": "flags", **counts, **asdict(FlagsConfig())},
        index=lambda: open_folder(folder),
        only=call.tool,
    )
    kept = {}
    tool = search.tools[call.tool]
    if hasattr(tool, "find"):
        search.tools[call.tool] = _Kept(tool, kept)
    began = time.monotonic()
    with Toolbox(search.tools, tools["deadline"], closing=search.close) as toolbox:
        result = toolbox.submit(call).result()
    seconds = time.monotonic() - began
    return kept.get("found") or _plain(result), result.error, seconds


class _Kept:
    """A tool that leaves what it found, with provider and costs, where it can be shown."""

    def __init__(self, tool, kept: dict):
        self.name, self._tool, self._kept = tool.name, tool, kept

    async def run(self, call: ToolCall):
        ask = getattr(self._tool, "answer", None) or self._tool.find
        found = self._kept["found"] = await ask(call)
        return tuple(hit.item() for hit in found.hits)


def _plain(result):
    from mmsr_jax.tools.hits import Found, Hit

    hits = tuple(Hit(i.title, i.link, i.text, picture=i.thumbnail) for i in result.items)
    return Found(hits, seconds=result.seconds)


def _record(tool: str, found, error: str | None, seconds: float) -> dict:
    from mmsr_jax.report.record import result_record
    from mmsr_jax.types import ToolResult

    items = tuple(hit.item() for hit in found.hits)
    return result_record(ToolResult(tool, items, seconds, error)) | {
        "provider": found.provider, "source": found.source, "cost": found.cost, "paid": found.paid,
    }  # fmt: skip


def _print(found, seconds: float) -> None:
    from mmsr_jax.cli import blocks

    coloured = blocks.shows_colours()
    if not found.hits:
        print("no results")
    for number, hit in enumerate(found.hits, start=1):
        print(f"{number}. {printable(hit.title)}  {printable(hit.link)}".rstrip())
        if hit.text:
            print(f"   {printable(hit.text)}")
        if coloured and hit.picture:
            for line in blocks.lines(hit.picture):
                print(f"   {line}")
    where = {"store": "from the store", "live": "live", "joined": "live"}[found.source]
    money = f", ${found.paid:.4f} paid" if found.paid else ""
    saved = f" (${found.cost:.4f} when live)" if found.cost and not found.paid else ""
    print(f"{found.provider}, {where}, {seconds:.2f} s{money}{saved}")
