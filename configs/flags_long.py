"""The flags world with more time: sharper choices, and for flags that were never shown too.

    mmsr train configs/flags_long.py

The diff to flags.py: twice the warm-up, four times as many steps of GRPO with a later fall of the
learning rate, and twice the samples in the evaluation.
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
        sft=replace(base.sft, steps=1200),
        grpo=replace(
            base.grpo, steps=360, optimizer=replace(base.grpo.optimizer, decay_midpoint=280)
        ),
        evaluation=replace(base.evaluation, samples=4),
    )
