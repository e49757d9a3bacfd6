"""GRPO: sample groups, score them, update, give the engine the new weights."""

import time

from mmsr_jax.agent.rollout import Ask, Rollouts
from mmsr_jax.agent.supply import Drawn, Supply
from mmsr_jax.build import Job
from mmsr_jax.evaluation.metrics import Scored, training
from mmsr_jax.logs import RunLog
from mmsr_jax.loops.stopping import check_search
from mmsr_jax.parallel import compiles
from mmsr_jax.report.record import trajectory_record
from mmsr_jax.report.trace import trace_records
from mmsr_jax.rewards.score import score
from mmsr_jax.tools.budget import SearchStopped
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.optimizer import optimizer, schedule
from mmsr_jax.train.update import grpo_update
from mmsr_jax.types import Trajectory
from mmsr_jax.weights.checkpoint import Checkpoints


def run(job: Job, log: RunLog, params):
    """Trains `params` for `grpo.steps`, from the newest checkpoint on; returns what they became.

    Args:
      params: where GRPO starts, and the frozen reference of its KL term. Taken over.
    """
    e = job.experiment
    config = e.grpo
    transform = optimizer(config.optimizer, config.steps * config.updates)
    rate = schedule(config.optimizer, config.steps * config.updates)
    fixed = job.fixed(transform)
    reference = job.reference(params) if config.loss.kl_weight > 0 else None
    stream = job.stream("train", e.data.grpo_categories, e.data.grpo_shares)
    with (
        Checkpoints(job.workdir / "checkpoints" / "grpo", e.checkpoint) as checkpoints,
        _Sampler(job, stream) as sampler,
    ):
        state = state_lib.create(params, transform, job.mesh)
        first = 0
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state_lib.vacate(state))
            first = meta["step"]
            sampler.restore(meta)
            job.skipped = meta["skipped"]
        if first == config.steps:
            return state.params
        if first:
            log.resume("grpo", first)
        elif "sft" in e.stages:
            log.resume("sft", e.sft.steps)
        else:
            log.resume()
        with log.progress(config.steps, "grpo", start=first) as bar:
            for number in range(first, config.steps):
                # 1. Sample.
                began = time.perf_counter()
                job.sync(state.params, keep_cache=e.carry.cache == "keep")
                synced = time.perf_counter() - began
                before = sampler.meta(number)
                groups, sampled = sampler.sample(number)
                try:
                    check_search(job)
                except SearchStopped:  # this step's answers are incomplete: it is to be done again
                    if number > first and checkpoints.latest != number:
                        checkpoints.save(number, state, before)
                    raise
                # 2. Score.
                price = e.reward.at_step(number + 1)
                scored = [
                    [Scored(t, score(list(t.responses), list(t.example.answers), price))
                     for t in group]
                    for group in groups
                ]  # fmt: skip
                # 3. Update.
                began = time.perf_counter()
                learned = [
                    ([s.trajectory for s in group], [s.score.total for s in group])
                    for group in scored
                ]
                state, values, micro = grpo_update(
                    fixed, config, state, reference, learned, version=job.engine.version
                )
                took = time.perf_counter() - began
                # 4. Write down.
                flat = [s for group in scored for s in group]
                metrics = (
                    training(flat)
                    | sampled
                    | {f"train/{k}": v for k, v in values.items()}
                    | {
                        "train/learning_rate": float(rate(number * config.updates)),
                        "train/micro_batches": micro,
                        "data/skipped": job.skipped + stream.skipped,
                        "time/sync": synced,
                        "time/update": took,
                        "compile/count": compiles.count(),
                    }
                    | job.search.counters()
                )
                log.scalars(number + 1, "grpo", metrics)
                shown = [g[i] for i in range(config.group_size) for g in scored if i < len(g)]
                shown = shown[: config.save_trajectories]
                records = [trajectory_record(s.trajectory, s.parts) for s in shown]
                log.trajectories(number + 1, records)
                log.traces(number + 1, trace_records(groups, number + 1))
                bar.advance({"reward": metrics["reward/mean"], "search": metrics["search/ratio"]})
                # 5. Checkpoint.
                done = number + 1
                if done % e.checkpoint.every == 0 or done == config.steps:
                    checkpoints.save(done, state, sampler.meta(done))
        return state.params


class _Sampler:
    """Groups of trajectories for one step after another, and what they cost."""

    def __init__(self, job: Job, stream):
        e = self.experiment = job.experiment
        self.job, self.stream = job, stream
        self.rollouts = Rollouts(
            job.engine, job.toolbox, job.setting, seed=e.seed, temperature=e.grpo.temperature,
            skipped=self._skip,
        )  # fmt: skip
        self.supply = Supply(self.rollouts, e.carry, e.grpo.prompts, self._draw)
        self.bad = 0

    def __enter__(self) -> "_Sampler":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.rollouts.abandon()  # the engine is the evaluation's next

    def restore(self, meta: dict) -> None:
        """Asks again what was in flight, then goes on with the data where it stood."""
        for question in meta.get("carried", []):
            self.stream.restore(question["origin"])
            self.supply.add(self._draw())
        self.stream.restore(meta["data"])

    def meta(self, step: int) -> dict:
        """What a checkpoint of `step` has to know to go on, as plain JSON."""
        return {
            "step": step,
            "data": self.stream.state(),
            "skipped": self.job.skipped,
            "carried": [{"origin": drawn.origin} for drawn in self.supply.in_flight],
        }

    def sample(self, number: int) -> tuple[list[list[Trajectory]], dict[str, float]]:
        """The groups of step `number`, and measurements under their names in metrics.jsonl."""
        self.bad = 0
        counters, asked = self.job.engine.counters, self.supply.drawn
        waited, began = self.rollouts.tools_wait, time.perf_counter()
        groups = self.supply.take(self.experiment.grpo.steps - number)
        took = time.perf_counter() - began
        used = self.job.engine.usage(counters, took)
        return groups, {f"engine/{name}": value for name, value in used.items()} | {
            "data/questions": self.supply.drawn - asked,
            "time/rollout": took,
            "time/tools_wait": self.rollouts.tools_wait - waited,
            "rollout/carried": len(self.supply.in_flight),
        }

    def _draw(self) -> Drawn:
        origin = self.stream.state()
        # The position in the data is another one each time that a question comes up.
        ask = Ask(next(self.stream), self.experiment.grpo.group_size, visit=origin["next_index"])
        return Drawn(ask, origin)

    def _skip(self, ask: Ask, error: ValueError) -> None:
        self.bad += 1
        self.job.skipped += 1
        if self.bad > 10 * self.experiment.grpo.prompts:
            raise RuntimeError(f"{self.bad} questions of one step cannot be asked: {error}")
