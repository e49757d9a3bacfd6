"""`mmsr search index`: builds an index over documents and pictures."""

import pathlib

EXAMPLE = "mmsr search index articles/ indices/articles"


def add(commands) -> None:
    """Adds the parser of `index` to those of `mmsr search`."""
    made = commands.add_parser(
        "index",
        prog="mmsr search index",
        description="Builds an index over a folder of .txt, .md, .html, .jsonl and pictures, or "
        "over parquet with columns id, title, link, text, image. It is there whole or not at all; "
        "the same command on an unchanged source does nothing.",
        example=EXAMPLE,
    )
    made.add_argument("source", metavar="SOURCE", help="a folder, or a .parquet file")
    made.add_argument("out", metavar="OUT", help="the index folder to make")
    made.add_argument("--text", default="fts", help='fts (default) or tantivy (extra "index")')
    made.add_argument(
        "--pictures",
        default="hash",
        help="hash (default: perceptual hash and colour), or the vision tower of a clip, siglip or "
        "qwen2_5_vl checkpoint",
    )
    made.add_argument(
        "--weights", default="", help="for clip, siglip, qwen2_5_vl: a folder or a hub id"
    )
    made.add_argument(
        "--vectors",
        default="auto",
        help="exact, usearch, or auto: usearch for more than 100,000 pictures",
    )
    made.add_argument("--words", type=int, default=100, help="most words of a passage (100)")
    made.add_argument("--thumbnail", type=int, default=224, help="pixels of a thumbnail (224)")
    made.add_argument("--replace", action="store_true", help="an older index at OUT may go")


def run(given) -> None:
    """Builds, and prints what is in the index and what was left out."""
    from mmsr_jax.embed import embedder
    from mmsr_jax.tools.index.build import IndexConfig, build
    from mmsr_jax.tools.index.text import file_bytes

    config = IndexConfig(given.text, given.vectors, given.words, given.thumbnail)
    made = embedder(given.pictures, given.weights)
    with _Progress() as progress:
        manifest, built = build(
            given.source, given.out, config, made, replace=given.replace, progress=progress
        )
    if not built:
        print(f"{given.out} is up to date: nothing in {manifest.source} was touched since")
    if manifest.text is not None:
        print(f"{manifest.text.passages:,} passages by {manifest.text.back_end}")
    if manifest.pictures is not None:
        part = manifest.pictures
        print(f"{part.pictures:,} pictures by {part.embedder}, {part.back_end} search")
    for reason, count in sorted(manifest.skipped.items()):
        print(f"left out: {count:,} x {reason}")
    print(f"{given.out}: {file_bytes(pathlib.Path(given.out)) / 1e6:,.1f} MB")


class _Progress:
    """A bar for each stage, where there is a terminal."""

    def __enter__(self):
        from rich import progress

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
        )
        self._tasks: dict = {}
        self._bars.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()
