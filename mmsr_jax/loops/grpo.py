"""GRPO: sample groups, score them, update, give the engine the new weights."""

import time

from mmsr_jax.agent.rollout import Ask, rollout
from mmsr_jax.build import Job
from mmsr_jax.evaluation.metrics import Scored, training
from mmsr_jax.logs import RunLog
from mmsr_jax.parallel import compiles
from mmsr_jax.report.record import trajectory_record
from mmsr_jax.rewards.score import score
from mmsr_jax.tools.budget import SearchStopped
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.optimizer import optimizer, schedule
from mmsr_jax.train.update import grpo_update
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
    with Checkpoints(job.workdir / "checkpoints" / "grpo", e.checkpoint) as checkpoints:
        state = state_lib.create(params, transform, job.mesh)
        stream = job.stream("train", e.data.grpo_categories, e.data.grpo_shares)
        first = 0
        if (restored := checkpoints.restore(state_lib.abstract(state))) is not None:
            state, meta = restored
            first = meta["step"]
            stream.restore(meta["data"])
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
                job.sync(state.params)
                synced = time.perf_counter() - began
                before = {"step": number, "data": stream.state(), "skipped": job.skipped}
                groups, timings, questions = _sample(job, stream, number)
                try:
                    job.search.check()
                except SearchStopped:  # this step's answers are incomplete: it is to be done again
                    if number > first and checkpoints.latest != number:
                        checkpoints.save(number, state, before)
                    raise
                # 2. Score.
                scored = [
                    [Scored(t, score(list(t.responses), list(t.example.answers), e.reward))
                     for t in group]
                    for group in groups
                ]  # fmt: skip
                # 3. Update.
                began = time.perf_counter()
                learned = [
                    ([s.trajectory.tokens for s in group], [s.score.total for s in group])
                    for group in scored
                ]
                state, values, micro = grpo_update(fixed, config, state, reference, learned)
                took = time.perf_counter() - began
                # 4. Write down.
                flat = [s for group in scored for s in group]
                metrics = (
                    training(flat)
                    | {f"train/{k}": v for k, v in values.items()}
                    | {
                        "train/learning_rate": float(rate(number * config.updates)),
                        "train/micro_batches": micro,
                        "data/skipped": job.skipped + stream.skipped,
                        "data/questions": questions,
                        "time/sync": synced,
                        "time/update": took,
                        "time/rollout": timings["rollout"],
                        "time/tools_wait": timings["tools_wait"],
                        "engine/tokens_per_second": timings["tokens"] / timings["rollout"],
                        "engine/occupancy": timings["occupancy"],
                        "compile/count": compiles.count(),
                    }
                    | job.search.counters()
                )
                log.scalars(number + 1, "grpo", metrics)
                shown = [g[i] for i in range(config.group_size) for g in scored if i < len(g)]
                shown = shown[: config.save_trajectories]
                records = [trajectory_record(s.trajectory, s.parts) for s in shown]
                log.trajectories(number + 1, records)
                bar.advance({"reward": metrics["reward/mean"], "search": metrics["search/ratio"]})
                # 5. Checkpoint.
                done = number + 1
                if done % e.checkpoint.every == 0 or done == config.steps:
                    meta = {"step": done, "data": stream.state(), "skipped": job.skipped}
                    checkpoints.save(done, state, meta)
        return state.params


def _sample(job: Job, stream, number: int):
    """`prompts` groups of trajectories; a question that cannot be asked is replaced and counted."""
    e = job.experiment
    groups, total, bad = [], {"rollout": 0.0, "tools_wait": 0.0}, []
    before = dict(job.engine.counters)
    asked = 0
    while len(groups) < e.grpo.prompts:
        asks = [
            Ask(next(stream), e.grpo.group_size, visit=number)
            for _ in range(e.grpo.prompts - len(groups))
        ]
        asked += len(asks)
        new, timings = rollout(
            job.engine, job.toolbox, asks, job.setting, seed=e.seed,
            temperature=e.grpo.temperature, skipped=lambda ask, error: bad.append((ask, error)),
        )  # fmt: skip
        groups += [group for group in new if group]
        total = {name: total[name] + timings[name] for name in total}
        if len(bad) > 10 * e.grpo.prompts:
            raise RuntimeError(f"{len(bad)} questions in a row cannot be asked: {bad[-1][1]}")
    job.skipped += len(bad)
    after = job.engine.counters
    sampled = after["sampled_tokens"] - before["sampled_tokens"]
    row_steps = after["row_steps"] - before["row_steps"]
    total |= {"tokens": sampled, "occupancy": sampled / max(row_steps, 1)}
    return groups, total, asked
