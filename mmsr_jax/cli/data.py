"""`mmsr data`: prepare a dataset, look at one, or write what its search engine finds."""

import collections
import dataclasses
import io

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmsr_jax.cli.endings import UsageError
from mmsr_jax.cli.words import Parser, printable

EXAMPLE = "mmsr data show flags --split test --count 10"


def run(words: list[str]) -> None:
    given = parser().parse(words)
    if given.action == "corpus":
        return _corpus(given)
    from mmsr_jax.data import pipeline  # brings grain and TFDS, which take seconds

    config = pipeline.DataConfig(name=given.name, data_dir=given.folder)
    if given.action == "build":
        _build(pipeline.prepare(config))
    else:
        try:
            examples = pipeline.read_all(dataclasses.replace(config, split=given.split))
        except ValueError as error:  # TFDS's own words for a split that there is not
            raise UsageError(str(error)) from error
        _show(given, examples)


def parser() -> Parser:
    does = "Prepares a dataset, shows some of its examples, or writes what its search engine finds."
    made = Parser("mmsr data", does, EXAMPLE)
    actions = made.add_subparsers(dest="action", metavar="build|show|corpus", required=True)
    build = actions.add_parser(
        "build", prog="mmsr data build", description="Prepares a dataset.", example=EXAMPLE
    )
    show = actions.add_parser(
        "show", prog="mmsr data show", description="Shows some examples.", example=EXAMPLE
    )
    for action in (build, show):
        action.add_argument("name", metavar="NAME", help="of the dataset, for example flags")
        action.add_argument("--folder", default="", help="of prepared datasets (default: a cache)")
    show.add_argument("--split", default="train", help="train or test (default: train)")
    show.add_argument("--count", type=int, default=12, help="examples to show (default: 12)")
    corpus = actions.add_parser(
        "corpus",
        prog="mmsr data corpus",
        description="Writes the documents and pictures that a world's search engine searches, as "
        "`mmsr search index` takes them.",
        example="mmsr data corpus flags corpus/flags",
    )
    corpus.add_argument("name", choices=("flags",), help="of the world: flags")
    corpus.add_argument("out", metavar="OUT", help="the folder to make")
    return made


def _corpus(given) -> None:
    from mmsr_jax.data.flags.corpus import write_corpus
    from mmsr_jax.data.flags.world import World

    sentences, pictures = write_corpus(World(), given.out)
    print(f"{sentences} sentences and {pictures} pictures in {given.out}")


def _build(builder) -> None:
    sizes = ", ".join(f"{name} {info.num_examples}" for name, info in builder.info.splits.items())
    print(f"{builder.info.full_name}: {sizes} examples in {builder.data_dir}")


def _show(given, examples) -> None:
    """A table of examples taken at equal distances, after the number of each category."""
    if given.count < 1:
        raise UsageError(f"--count must be at least 1, not {given.count}")
    counts = collections.Counter(example.category for example in examples)
    sizes = ", ".join(f"{category or 'any'} {n}" for category, n in sorted(counts.items()))
    # Text, not strings: a dataset's brackets are no markup.
    title = Text(printable(f"{given.name}, {given.split}: {sizes}"), style="table.title")
    table = Table(title=title, title_justify="left", box=None)
    for column in ("id", "category", "picture", "question", "answers"):
        table.add_column(column, overflow="fold")
    step = max(len(examples) // given.count, 1)
    for example in examples[::step][: given.count]:
        width, height = Image.open(io.BytesIO(example.image)).size
        cells = (example.id, example.category, f"{width}x{height}", example.question)
        table.add_row(*(Text(printable(cell)) for cell in (*cells, " / ".join(example.answers))))
    Console().print(table)
