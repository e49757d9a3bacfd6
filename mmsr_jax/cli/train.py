"""`mmsr train`."""

import pathlib

from mmsr_jax.cli import config
from mmsr_jax.cli.endings import work
from mmsr_jax.cli.words import Parser
from mmsr_jax.logs import RunLog


def run(words: list[str]) -> None:
    """Runs the stages that a config names, in order; continues where an earlier run stopped."""
    experiment, given = config.read(parser(), words)
    workdir = pathlib.Path(given.workdir or f"runs/{experiment.name}")
    with RunLog(workdir) as log, work(workdir, lambda: log.begun):
        from mmsr_jax.loops import run as loop

        loop.run(experiment, workdir, log)


def parser() -> Parser:
    made = config.parser(
        "mmsr train",
        "[--workdir DIR]",
        "Runs the stages of an experiment (warm-up, GRPO, evaluation) in order. The same command\n"
        "continues a run that was stopped.",
        "mmsr train configs/flags.py --grpo.steps 50 --workdir runs/short",
    )
    made.add_argument("--workdir", help="the run's folder (default: runs/NAME of the config)")
    return made
