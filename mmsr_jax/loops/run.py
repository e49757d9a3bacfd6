"""`mmsr train`: the stages of an experiment in order, each continued where it stopped."""

import json
import pathlib
import time

import jax

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.build import Job
from mmsr_jax.experiment import Experiment
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import evaluate, grpo, sft
from mmsr_jax.loops.alone import alone
from mmsr_jax.parallel import compiles
from mmsr_jax.report.html import write_report
from mmsr_jax.report.table import evaluation_table


def run(experiment: Experiment, workdir: pathlib.Path, log: RunLog) -> dict[str, float]:
    """Runs what is left to do of the experiment in `workdir`; returns the summary.

    Raises:
      ValueError: the folder holds another experiment, another process works in it, or this one is
        one of several.
    """
    if jax.process_count() > 1:
        # Each would draw the same questions, and batches of different sizes would never meet.
        raise ValueError(
            f"training runs in one process so far, not in {jax.process_count()}: use one host with "
            "all of its devices"
        )
    log.primary = True
    with alone(workdir), experiment_lib.settled(experiment, workdir, lambda: log.begun):
        return _stages(experiment, workdir, log)


def _stages(experiment: Experiment, workdir: pathlib.Path, log: RunLog) -> dict[str, float]:
    began = time.perf_counter()
    job = Job(experiment, workdir)
    summary = {}
    try:
        job.check_questions()
        params = sft.run(job, log) if "sft" in experiment.stages else job.start()
        if "eval" in experiment.stages:
            summary |= _flat("before", evaluate.run(job, log, "before", params))
        if "grpo" in experiment.stages:
            params = grpo.run(job, log, params)
            if "eval" in experiment.stages:
                summary |= _flat("after", evaluate.run(job, log, "after", params))
    finally:
        job.close()
    summary |= {
        "time/total": time.perf_counter() - began,
        "compile/count": compiles.count(),
        "compile/seconds": compiles.seconds(),
        "data/skipped": job.skipped,
        "model/parameters": sum(p.size for p in jax.tree.leaves(job.whole(params))),
        "model/trained_parameters": sum(p.size for p in jax.tree.leaves(params)),
    }
    if log.primary:
        _finish(workdir, summary, log)
    return summary


def _flat(when: str, values: dict[str, float]) -> dict[str, float]:
    """Names of the contract: `eval/WHEN/...`; constant policies stand beside, not under it."""
    return {
        f"eval/{name}" if name.startswith(("always_search/", "never_search/"))
        else f"eval/{when}/{name}": value
        for name, value in values.items()
    }  # fmt: skip


def _finish(workdir: pathlib.Path, summary: dict[str, float], log: RunLog) -> None:
    path = workdir / "summary.json"
    if log.begun or not path.exists():  # else all was done before: so are its times
        path.write_text(json.dumps(summary, indent=1, sort_keys=True))
    report = write_report(workdir)  # first: whoever reads standard output may have gone
    log.print(evaluation_table(summary))
    log.print(f"Report with curves and trajectories: {report}")
