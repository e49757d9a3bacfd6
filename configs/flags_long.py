"""The flags world with more time: sharper choices, and for flags that were never shown too.

    mmsr train configs/flags_long.py

The diff to flags.py: a longer warm-up, four times as many steps of GRPO with a later fall of the
learning rate and a weaker pull to the warm-up policy, and twice the samples in the evaluation. What
a policy does with a flag that it never saw depends on how many different flags it has learned not
to know: so every country that qualifies has a part, as an unfamiliar one, and GRPO asks about the
unfamiliar ones too.
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
        flags=replace(base.flags, unfamiliar=34),
        data=replace(
            base.data,
            grpo_categories=("known", "unknown", "unfamiliar"),
            grpo_shares=(1.0, 0.6, 0.4),
        ),
        sft=replace(base.sft, steps=1200),
        grpo=replace(
            base.grpo,
            steps=360,
            loss=replace(base.grpo.loss, kl_weight=0.02),
            optimizer=replace(base.grpo.optimizer, decay_midpoint=280),
        ),
        evaluation=replace(base.evaluation, samples=4),
    )
