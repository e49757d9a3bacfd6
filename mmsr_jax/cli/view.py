"""`mmsr view`."""

from mmsr_jax.cli.words import Parser


def run(words: list[str]) -> None:
    """Writes a run's report and says where it is."""
    given = parser().parse(words)
    from mmsr_jax.report.html import write_report  # matplotlib takes a while

    print(write_report(given.workdir))


def parser() -> Parser:
    parser = Parser(
        "mmsr view",
        "Writes report.html into a run's folder: curves, tables, trajectories with pictures.\n"
        "One self-contained file; it can be written while the run goes on.",
        "mmsr view runs/flags",
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="a run's folder")
    return parser
