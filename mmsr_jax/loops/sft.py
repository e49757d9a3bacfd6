"""The warm-up: supervised fine-tuning on demonstrations."""

import time

from mmsr_jax.build import Job
from mmsr_jax.logs import RunLog
from mmsr_jax.parallel import compiles
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.assemble import Piece
from mmsr_jax.train.optimizer import optimizer, schedule
from mmsr_jax.train.update import sft_update
from mmsr_jax.weights.checkpoint import Checkpoints


def run(job: Job, log: RunLog):
    """Trains for `sft.steps`, from the newest checkpoint on; returns what was trained."""
    e = job.experiment
    config = e.sft
    transform = optimizer(config.optimizer, config.steps)
    fixed = job.fixed(transform)
    rate = schedule(config.optimizer, config.steps)
    with Checkpoints(job.workdir / "checkpoints" / "sft", e.checkpoint) as checkpoints:
        # 1. Start: newest checkpoint, or else `weights`, or random ones.
        state = state_lib.create(job.start(), transform, job.mesh)
        first, meta = 0, {}
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state_lib.vacate(state))
            first = meta["step"]
        if first == config.steps:
            job.skipped += meta.get("skipped", 0)
            return state.params
        log.resume("sft", first) if first else log.resume()
        # 2. Material: every lesson played once through the real tools.
        lessons = job.demonstrations()
        # 3. Steps. What a step sees depends on the seed and its number only.
        with log.progress(config.steps, "sft", start=first) as bar:
            for number in range(first, config.steps):
                began = time.perf_counter()
                chosen = _batch(lessons, config.batch, job.random(1, number))
                pieces = [Piece(tokens, weight=weight) for tokens, weight in chosen]
                state, values, micro = sft_update(fixed, state, pieces)
                log.scalars(
                    number + 1,
                    "sft",
                    {f"train/{k}": v for k, v in values.items()}
                    | {
                        "train/learning_rate": float(rate(number)),
                        "train/micro_batches": micro,
                        "data/skipped": job.skipped,
                        "time/update": time.perf_counter() - began,
                        "compile/count": compiles.count(),
                    },
                )
                bar.advance({"loss": values["loss"]})
                # 4. Checkpoint by the clock of steps, and always at the end.
                done = number + 1
                if done % (10 * e.checkpoint.every) == 0 or done == config.steps:
                    checkpoints.save(done, state, {"step": done, "skipped": job.skipped})
        return state.params


def _batch(lessons, composition, rng):
    """`count` conversations of each kind with their weights, drawn from all there are."""
    chosen = []
    for kind, count, weight in composition:
        pool = lessons.get(kind, [])
        chosen += [(pool[i], weight) for i in rng.integers(len(pool), size=count)] if count else []
    return sorted(chosen, key=lambda pair: -len(pair[0]))
