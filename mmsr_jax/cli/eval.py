"""`mmsr eval`."""

import pathlib

from mmsr_jax.cli import config
from mmsr_jax.cli.endings import work
from mmsr_jax.cli.words import Parser

WORKFLOWS = "on_demand,always_search,never_search"


def run(words: list[str]) -> None:
    """Evaluates the policy of a run's folder; prints a table and writes `eval.json`."""
    experiment, given = config.read(parser(), words)
    workdir = pathlib.Path(given.workdir or f"runs/{experiment.name}")
    workflows = tuple(name.strip() for name in given.workflow.split(",") if name.strip())
    if not workdir.is_dir():
        raise FileNotFoundError(2, "there is no such run; mmsr train makes one", str(workdir))
    with work(workdir, lambda: False):
        from mmsr_jax.loops import evaluate

        evaluate.command(experiment, workdir, workflows)


def parser() -> Parser:
    made = config.parser(
        "mmsr eval",
        "[--workdir DIR] [--workflow A,B]",
        "Accuracy and search ratio of a trained policy on held-out questions, per workflow.",
        "mmsr eval configs/flags.py --workdir runs/flags --workflow on_demand",
    )
    made.add_argument("--workdir", help="the run to evaluate (default: runs/NAME of the config)")
    made.add_argument("--workflow", default=WORKFLOWS, help=f"some of {WORKFLOWS} (default: all)")
    return made
