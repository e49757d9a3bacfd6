"""The flags world with an hour instead of a quarter: sharper choices, and for unseen flags too.

    mmsr train configs/flags_long.py

The diff to flags.py: more unfamiliar flags' worth of practice in the warm-up, more and larger
groups in GRPO, and a learning rate that falls, which stops the swinging of the last steps.
"""

import dataclasses

from flags import get_config as short

from mmsr_jax.experiment import Experiment


def get_config() -> Experiment:
    base = short()
    replace = dataclasses.replace
    return replace(
        base,
        name="flags_long",
        sft=replace(base.sft, steps=600),
        grpo=replace(base.grpo, steps=500, prompts=16, group_size=8),
        evaluation=replace(base.evaluation, samples=4),
    )
