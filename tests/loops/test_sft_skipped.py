"""Lessons that cannot be played are counted, also by a run that finds its warm-up done."""

import dataclasses

from mmsr_jax.build import Job
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import sft


def test_skipped_lessons_are_remembered(small, tmp_path):
    replace = dataclasses.replace
    experiment = replace(
        small,
        pack=replace(small.pack, length=124),  # too short for the drills with the longest names
        sft=replace(small.sft, steps=1, batch=(("direct", 1, 1.0), ("drill", 1, 1.0))),
    )
    skipped = []
    for _ in range(2):
        job = Job(experiment, tmp_path)
        try:
            with RunLog(tmp_path, tensorboard=False) as log:
                sft.run(job, log)
            skipped.append(job.skipped)
        finally:
            job.close()
    assert skipped[0] > 0 and skipped[1] == skipped[0]
