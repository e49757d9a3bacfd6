"""The flags world: a million-parameter model learns on two CPU cores when to search.

    mmsr train configs/flags.py

Real flags, real capitals, a real (local) search engine. The warm-up teaches the model the capitals
of 36 countries and the use of both tools, and to toss a coin between answering and searching. Then
GRPO, with the paper's reward, has to find out that searching pays where the answer is not known,
and only there.
"""

import dataclasses

from mmsr_jax import protocol
from mmsr_jax.data.flags.lessons import LessonConfig
from mmsr_jax.data.flags.world import FlagsConfig
from mmsr_jax.engine.engine import EngineConfig
from mmsr_jax.evaluation.policies import EvaluationConfig
from mmsr_jax.experiment import DataConfig, Experiment, TokenizerConfig, ToolsConfig
from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.model.config import preset
from mmsr_jax.train.assemble import PackConfig
from mmsr_jax.train.grpo import GRPOConfig, LossConfig
from mmsr_jax.train.optimizer import OptimizerConfig
from mmsr_jax.train.sft import SFTConfig
from mmsr_jax.weights.checkpoint import CheckpointConfig

VOCABULARY = 1536
# A question's picture is 84 x 56 pixels: 24 patches, 6 tokens. A thumbnail is 2 tokens.
PATCHES = 24


def get_config() -> Experiment:
    tiny = preset("tiny")
    return Experiment(
        name="flags",
        model=dataclasses.replace(
            tiny, text=dataclasses.replace(tiny.text, vocab_size=VOCABULARY)
        ),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        images=ImageConfig(min_pixels=28 * 28, max_pixels=84 * 56),
        flags=FlagsConfig(known=36, unknown=30, unfamiliar=24, never_shown=24),
        lessons=LessonConfig(),
        tools=ToolsConfig(image_results=2, text_results=1),
        # Half of each step's questions are known ones: the pulls on the shared habit of searching
        # cancel, and what differs between the kinds is what is left to learn (MMSearch-R1 balances
        # its data as well).
        data=DataConfig(grpo_shares=(1.0, 1.0)),
        protocol=dataclasses.replace(
            protocol.SHORT, max_result_items=2, text_item="{n}. {text}\n"
        ),
        engine=EngineConfig(
            rows=128, slots=128, turn_tokens=40, decode_steps=16, extend_rows=16,
            extend_tokens=32, patches=384, pictures=32, picture_patches=PATCHES,
            feature_rows=4096,
        ),
        pack=PackConfig(
            rows=16, length=160, patches=1536, pictures=64, picture_patches=PATCHES
        ),
        sft=SFTConfig(
            steps=720,
            # A coin's toss between answering and searching (direct : ask, guess : doubt). Where no
            # memory is sharp, "Look." wins more often than it is taught: hence the eight heavier
            # guesses to four doubts. The rest is practice that does not touch the choice. Copying
            # from results takes longest to learn; many small steps get there sooner than few
            # large ones.
            batch=(
                ("direct", 15, 2.0),
                ("ask", 13, 2.0),
                ("guess", 8, 1.25),
                ("doubt", 4, 1.0),
                ("recall", 4, 1.0),
                ("search", 6, 1.0),
                ("drill", 16, 2.0),
                ("echo", 8, 1.0),
            ),
            optimizer=OptimizerConfig(
                learning_rate=2e-3, schedule="cosine", warmup_steps=20, final_ratio=0.05,
            ),
        ),
        grpo=GRPOConfig(
            steps=90,
            prompts=16,
            group_size=8,
            loss=LossConfig(
                # The paper's 0.001 has a pretrained 7B behind it that knows what it knows. Here a
                # pull to the warm-up policy, which searches half of the time, keeps both choices
                # alive until the difference between the two kinds of question is learned.
                kl_weight=0.05,
                advantage_std=True,
            ),
            # Higher than the prototype's 1e-4, since balanced questions leave no bias to run away
            # with; the paper's sigmoid lets the last steps settle.
            optimizer=OptimizerConfig(
                learning_rate=2e-4, schedule="sigmoid_decay", decay_midpoint=70, decay_ratio=0.9
            ),
        ),
        evaluation=EvaluationConfig(samples=2),
        checkpoint=CheckpointConfig(every=10),
    )  # fmt: skip
