"""A model, a tokenizer and conversations so small that a test costs a second.

Everything that needs a model shares these sizes, so that a program compiles once per test run.
"""

import contextlib
import dataclasses
import functools
import io
import os
import resource
import signal

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes on one GPU: none takes all of it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

REASONS = ("Known.", "Look.", "Name.", "Found.")
WORDS = ("Lisbon", "Porto", "Portugal", "capital of Portugal", "Paris", "France", "What capital?")


class Tiny:
    """The small world: everything is made when it is first asked for, with fixed seeds."""

    @functools.cached_property
    def protocol(self):
        from mmsr_jax import protocol

        return dataclasses.replace(protocol.SHORT, max_result_items=2)

    @functools.cached_property
    def tokenizer(self):
        from mmsr_jax import protocol
        from mmsr_jax.inputs import tokenizer

        actions = [protocol.ImageSearch(), *map(protocol.TextSearch, WORDS)]
        actions += map(protocol.Answer, WORDS)
        said = [protocol.render(reason, action) for reason in REASONS for action in actions]
        shown = [f"user\n<information>1. {word}: {word}\n</information>" for word in WORDS]
        return tokenizer.train([*said, *shown, "assistant\n"] * 3, 384)

    @functools.cached_property
    def model(self):
        """Two layers in each tower, grouped heads, tied embeddings, float32."""
        from mmsr_jax.model.config import preset

        t, base = self.tokenizer, preset("tiny")
        return dataclasses.replace(
            base,
            text=dataclasses.replace(
                base.text, vocab_size=384, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16,
                intermediate=64, mrope_section=(2, 3, 3),
            ),
            vision=dataclasses.replace(
                base.vision, depth=2, hidden=32, heads=2, intermediate=48, out_hidden=32,
                full_attention_layers=(1,),
            ),
            image_token_id=t.image_pad,
            vision_start_token_id=t.vision_start,
            vision_end_token_id=t.vision_end,
            eos_token_id=t.im_end,
            bos_token_id=t.pad_id,
        )  # fmt: skip

    @functools.cached_property
    def abstract(self):
        """The graph and the shapes of the parameters."""
        from mmsr_jax.model import qwen2_5_vl as qwen

        return qwen.abstract(self.model)

    @property
    def graph(self):
        return self.abstract[0]

    def params(self, seed: int = 0):
        """Random weights, no bias zero, no norm one, and layers that outweigh the embedding.

        Fresh weights would hide mistakes: in them a token mostly predicts itself.
        """
        import jax

        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            name = path[-1].key
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            if name == "scale":
                return 1 + 0.2 * noise
            wide = leaf.shape[0] == self.model.vision.patch_dim
            return (0.04 if wide else 0.2) * noise

        drawn = jax.tree_util.tree_map_with_path(draw, self.abstract[1])
        # Committed to the device, as weights in training are.
        return jax.device_put(drawn, jax.devices()[0])

    @functools.cached_property
    def transform(self):
        """One optimiser for all: `step.apply` compiles anew for each."""
        from mmsr_jax.train.optimizer import OptimizerConfig, optimizer

        return optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.0), 100)

    @functools.cached_property
    def engine_config(self):
        from mmsr_jax.engine.engine import EngineConfig

        return EngineConfig(
            rows=6, slots=128, page=16, turn_tokens=16, decode_steps=5, extend_rows=4,
            extend_tokens=8, patches=96, pictures=6, picture_patches=64, feature_rows=120,
        )  # fmt: skip

    def engine(self, params=None, eos_ids=(), config=None):
        """An engine; without `eos_ids` a turn ends when its budget is used up."""
        from mmsr_jax.engine.engine import Engine

        engine = Engine(self.graph, self.model, config or self.engine_config, eos_ids)
        engine.set_params(self.params() if params is None else params)
        return engine

    @functools.cached_property
    def pack(self):
        from mmsr_jax.train.assemble import PackConfig

        return PackConfig(rows=4, length=128, patches=192, pictures=12, picture_patches=64)

    @functools.cached_property
    def setting(self):
        from mmsr_jax.agent.episode import Setting
        from mmsr_jax.inputs.images import ImageConfig

        return Setting(
            protocol=self.protocol,
            tokenizer=self.tokenizer,
            images=ImageConfig(min_pixels=28 * 28, max_pixels=140 * 84),
            max_tokens=self.engine_config.slots,
            turn_tokens=self.engine_config.turn_tokens,
        )

    def picture(self, h: int, w: int, seed: int = 0):
        """Noise of h x w patches."""
        from mmsr_jax.types import Picture

        rng = np.random.default_rng([h, w, seed])
        patches = rng.normal(size=(h * w, self.model.vision.patch_dim)).astype(np.float32)
        return Picture(patches, (1, h, w))

    def png(self, width: int = 84, height: int = 56, seed: int = 0) -> bytes:
        """An encoded picture of coloured blocks."""
        from PIL import Image

        rng = np.random.default_rng([width, height, seed])
        blocks = rng.integers(0, 256, size=(4, 6, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(out, "PNG")
        return out.getvalue()

    def example(self, name: str = "e", question: str = "What capital?", **fields):
        from mmsr_jax.types import Example

        fields = {"image": self.png(), "answers": ("Lisbon",), "source": "test"} | fields
        return Example(name, question, **fields)

    def prompt(self, *parts):
        """Tokens of a user's message of texts and pictures, and of the turn opened after it."""
        from mmsr_jax.inputs import chat
        from mmsr_jax.types import Message

        messages = (Message("system", ("",)), Message("user", parts))
        return chat.prompt(messages, self.tokenizer)

    def tool(self, before, *parts):
        """Tokens of a tool's message after the conversation `before`."""
        from mmsr_jax.inputs import chat
        from mmsr_jax.types import Message

        features = sum(p.patches.shape[0] // 4 for p in before.pictures)
        return chat.tool_turn(
            Message("user", parts), self.tokenizer, before.next_position, features
        )

    def conversation(self, first, *tools, seed: int = 0, length: int = 7):
        """A conversation in which the model says random tokens: prompt, (model, tool)*, model.

        Args:
          first: parts of the prompt; tools: parts of each tool message.
          length: tokens of the first model turn; each later one is one longer.
        """
        from mmsr_jax.inputs import chat

        rng = np.random.default_rng(seed)
        tokens = self.prompt(*first)
        for turn in range(len(tools) + 1):
            ids = rng.integers(0, 300, size=length + turn)
            spoken = chat.model_turn(ids, -rng.random(length + turn), tokens.next_position)
            tokens = chat.join(tokens, spoken)
            if turn < len(tools):
                tokens = chat.join(tokens, self.tool(tokens, *tools[turn]))
        return tokens


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def full_disk():
    """`with full_disk(100):` files beyond so many bytes fail to be written, as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int):
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    return limited
