"""The table: the policy before and after GRPO, greedy and sampled, beside the constant ones."""

import json
import pathlib

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.agent.rollout import Ask, rollout
from mmsr_jax.build import Job
from mmsr_jax.evaluation import metrics, policies
from mmsr_jax.evaluation.metrics import Scored
from mmsr_jax.experiment import Experiment
from mmsr_jax.logs import RunLog
from mmsr_jax.loops.stopping import check_search, check_search_between
from mmsr_jax.report.record import trajectory_record
from mmsr_jax.report.table import evaluation_table
from mmsr_jax.report.trace import trace_records
from mmsr_jax.rewards.score import score


def run(job: Job, log: RunLog, name: str, params) -> dict[str, float]:
    """Evaluates `params` on the test split and keeps the numbers in `eval.json` under `name`.

    Args:
      params: what was trained (with LoRA the adapter).

    Returns:
      Flat numbers: greedy ones without prefix, `sampled/...` at the training temperature.
    """
    kept = _read(job.workdir)
    if name in kept:
        return kept[name]
    job.sync(params)
    values = metrics_of(job, _play(job, log, f"{name}, greedy", 0.0, 1))
    sampled = _play(job, log, f"{name}, sampled", job.experiment.grpo.temperature, _samples(job))
    values |= {f"sampled/{k}": v for k, v in metrics_of(job, sampled).items()}
    if name == "after":
        values |= _constants(job, log, sampled)
        chosen = _choice(job, sampled)
        records = [trajectory_record(s.trajectory, s.parts) for s in chosen]
        log.trajectories("eval", records)
    _write(job.workdir, kept | {name: values})
    return values


def command(experiment: Experiment, workdir: pathlib.Path, workflows: tuple[str, ...]) -> None:
    """`mmsr eval`: the newest weights of a run on the test split, one row a workflow.

    `on_demand` lets the policy choose, `always_search` and `never_search` choose for it. Prints
    the table and writes it to `eval.json` under the workflow's name.

    Raises:
      ValueError: an unknown workflow, a folder without a checkpoint, or one whose weights are not
        this experiment's.
    """
    config = experiment.evaluation
    forced = {
        "on_demand": "",
        "always_search": policies.always_search(config),
        "never_search": policies.never_search(config),
    }
    if unknown := [name for name in workflows if name not in forced]:
        raise ValueError(f"unknown workflow {unknown[0]!r}; there are {', '.join(forced)}")
    experiment_lib.check_weights(experiment, workdir)
    job = Job(experiment, workdir)
    try:
        job.sync(job.newest_params())
        with RunLog(workdir, tensorboard=False) as log:
            kept = {}
            for name in workflows:
                played = _play(job, log, name, 0.0, 1, forced[name])
                kept[name] = metrics_of(job, played)
            _write(workdir, _read(workdir) | kept)
            log.print(
                evaluation_table(
                    {f"eval/{n}/{k}": v for n, m in kept.items() for k, v in m.items()}
                )
            )
    finally:
        job.close()


def metrics_of(job: Job, scored: list[Scored]) -> dict[str, float]:
    """Overall numbers over the categories of training, and each category's own."""
    config = job.experiment.evaluation
    values = metrics.summarise(scored, config.categories)
    unseen = metrics.summarise(scored, config.unseen)
    return values | {k: v for k, v in unseen.items() if "/" in k}


def _samples(job: Job) -> int:
    return job.experiment.evaluation.samples


def _constants(job: Job, log: RunLog, sampled: list[Scored]) -> dict[str, float]:
    """Always-search and never-search with the same weights, and the learned policy's lead."""
    config = job.experiment.evaluation
    temperature = job.experiment.grpo.temperature
    values = {}
    own = [s for s in sampled if s.trajectory.example.category in config.categories]
    for name, forced in (
        ("always_search", policies.always_search(config)),
        ("never_search", policies.never_search(config)),
    ):
        played = _play(job, log, name, temperature, _samples(job), forced)
        values |= {f"{name}/{k}": v for k, v in metrics_of(job, played).items()}
        played = [s for s in played if s.trajectory.example.category in config.categories]
        lead, error = metrics.paired(own, played, "reward")
        values |= {f"{name}/lead": lead, f"{name}/lead_se": error}
    return values


def _play(job: Job, log: RunLog, title: str, temperature: float, samples: int, forced: str = ""):
    """All test questions through the agent, scored."""
    e = job.experiment
    examples = job.examples("test", e.evaluation.categories + e.evaluation.unseen)
    # Evaluation has its own random streams, the same for every policy: comparisons are paired.
    asks = [Ask(example, samples, visit=-1, forced=forced) for example in examples]
    bad = []

    def done(steps: int) -> None:
        check_search_between(job)  # now: every question more would be answered without results
        bar.advance(steps=steps)

    with log.progress(len(asks) * samples, title) as bar:
        groups, _ = rollout(
            job.engine, job.toolbox, asks, job.setting, seed=e.seed, temperature=temperature,
            done=done, skipped=lambda ask, error: bad.append(error),
        )  # fmt: skip
    check_search(job)
    job.skipped += len(bad)
    name = "-".join(["eval", *title.split(", ")])
    log.traces(name, trace_records(groups, name))
    return [
        Scored(t, score(list(t.responses), list(t.example.answers), e.reward))
        for group in groups
        for t in group
    ]


def _choice(job: Job, scored: list[Scored], each: int = 5) -> list[Scored]:
    """A few trajectories of every category, searched and not, right and wrong, for the report."""
    chosen, seen = [], {}
    for s in scored:
        category = s.trajectory.example.category
        key = (category, s.searched, bool(s.score.correct))
        entity = (category, s.trajectory.example.entity)
        if seen.get(key, 0) < 2 and seen.get(category, 0) < each and entity not in seen:
            chosen.append(s)
            seen[key] = seen.get(key, 0) + 1
            seen[category] = seen.get(category, 0) + 1
            seen[entity] = 1
    return chosen


def _read(workdir: pathlib.Path) -> dict:
    path = workdir / "eval.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(workdir: pathlib.Path, values: dict) -> None:
    path = workdir / "eval.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True))
    temporary.replace(path)
