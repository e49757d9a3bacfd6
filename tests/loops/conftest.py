"""The flags experiment, shrunk until a whole run takes seconds."""

import dataclasses

import pytest

from mmsr_jax.cli import config
from mmsr_jax.experiment import Experiment


def shrink(experiment: Experiment, data_folder: str) -> Experiment:
    """Few entities, two layers, a handful of steps; the same rooms, tools and stages."""
    replace = dataclasses.replace
    model = experiment.model
    return replace(
        experiment,
        model=replace(
            model,
            text=replace(
                model.text, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16,
                intermediate=48, mrope_section=(2, 3, 3), vocab_size=640,
            ),
            vision=replace(
                model.vision, depth=2, hidden=16, heads=2, intermediate=24, out_hidden=32,
                full_attention_layers=(1,),
            ),
        ),
        tokenizer=replace(experiment.tokenizer, vocab_size=640),
        flags=replace(
            experiment.flags, known=4, unknown=4, unfamiliar=3, never_shown=3,
            train_pictures=2, test_pictures=1,
        ),
        lessons=replace(experiment.lessons, drills=8, echoes=4, search_every=1),
        data=replace(experiment.data, folder=data_folder),
        engine=replace(experiment.engine, rows=16, slots=240, extend_rows=8, feature_rows=512),
        pack=replace(experiment.pack, rows=4, length=240, pictures=16, patches=256),
        sft=replace(
            experiment.sft, steps=4,
            batch=(("direct", 2, 1.0), ("ask", 2, 1.0), ("guess", 1, 1.0), ("doubt", 1, 1.0),
                   ("recall", 1, 1.0), ("search", 1, 1.0), ("drill", 1, 2.0), ("echo", 1, 1.0)),
        ),
        grpo=replace(experiment.grpo, steps=5, prompts=3, group_size=4),
        evaluation=replace(experiment.evaluation, samples=1),
        checkpoint=replace(experiment.checkpoint, every=2),
    )  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Experiment:
    data = tmp_path_factory.mktemp("data")
    return shrink(config.load("configs/flags.py"), str(data))
