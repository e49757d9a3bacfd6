"""Our side of the comparison: programs of the model, compiled apart from being timed."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.bench.workload import Workload
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.attention import cached, choose
from mmsr_jax.model.cache import PAGE
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.parallel.rules import TRAIN_RULES, Placement


class Ours:
    """The model's programs, compiled before they are timed."""

    def __init__(self, config: ModelConfig, params: dict):
        """`params` with layers stacked or apart."""
        self.config, self.params = config, params
        self.graph = qwen.abstract(config)[0]

    def forward(self, work: Workload):
        """(compiled: () -> logits [1, T, V], seconds to compile)."""
        inputs = jax.device_put(work.inputs)
        call, seconds = _compiled(
            lambda params, inputs: qwen.forward(self.graph, params, inputs).logits,
            self.params,
            inputs,
        )
        return lambda: jax.block_until_ready(call(self.params, inputs)), seconds

    def backward(self, work: Workload):
        """(compiled: () -> (loss, gradients), seconds to compile)."""
        inputs = jax.device_put(work.inputs)

        def loss(params, inputs):
            logits = qwen.forward(self.graph, params, inputs).logits[:, :-1]
            chosen = jnp.take_along_axis(logits, inputs.ids[:, 1:, None], axis=-1)[..., 0]
            return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

        call, seconds = _compiled(jax.value_and_grad(loss), self.params, inputs)
        return lambda: jax.block_until_ready(call(self.params, inputs)), seconds

    def decode(self, work: Workload, rows: int, tokens: int):
        """(compiled: () -> tokens [rows, tokens], seconds to compile).

        One program decodes all tokens, as the engine's does; the prompt comes before.
        """
        length = work.ids.shape[1]
        cache = qwen.init_cache(self.config, rows, length + tokens)
        first, cache = jax.jit(self._prefill, donate_argnums=2)(
            self.params, jax.device_put(_repeated(work.inputs, rows)), cache
        )
        start = length + work.delta

        def loop(params, cache, first):
            def body(step, carry):
                cache, token, chosen = carry
                inputs = qwen.Inputs(
                    ids=token[:, None],
                    positions=jnp.full((3, rows, 1), start + step, jnp.int32),
                    segments=jnp.ones((rows, 1), jnp.int32),
                    image_index=jnp.full((rows, 1), -1, jnp.int32),
                )
                out = qwen.forward(self.graph, params, inputs, cache)
                token = jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32)
                return out.cache, token, chosen.at[:, step].set(token)

            chosen = jnp.zeros((rows, tokens), jnp.int32)
            cache, _, chosen = jax.lax.fori_loop(0, tokens, body, (cache, first, chosen))
            return dataclasses.replace(cache, lengths=cache.lengths - tokens), chosen

        call, seconds = _compiled(loop, self.params, cache, first, donate=1)
        kept = [cache]  # donated to each run, which gives it back

        def once() -> np.ndarray:
            kept[0], chosen = call(self.params, kept[0], first)
            return np.asarray(chosen)

        return once, seconds

    def attention(self, work: Workload) -> dict[str, str]:
        """Which implementation serves the row, whole frames and windows; decoding has its own."""
        config, vision, place = self.config, work.inputs.vision, Placement(None, TRAIN_RULES)
        lengths = {
            "text": (work.ids.shape[1], config.text.head_dim),
            "frames": (vision.frames.shape[1], config.vision.head_dim),
            "windows": (vision.windows.shape[1], config.vision.head_dim),
        }
        return {
            what: choose.choose(
                config.attention,
                choose.Case(
                    platform=choose.platform_of(place),
                    dtype=config.dtype,
                    head_dim=head_dim,
                    length=length,
                    causal=what == "text",
                    capability=choose.capability_of(place),
                ),
            )
            for what, (length, head_dim) in lengths.items()
        }

    def cached_attention(self) -> str:
        """Which implementation looks at the cache while decoding."""
        text, place = self.config.text, Placement(None, TRAIN_RULES)
        case = cached.CachedCase(
            platform=choose.platform_of(place),
            dtype=self.config.dtype,
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            length=1,
            page=PAGE,
            capability=choose.capability_of(place),
        )
        return cached.choose_cached(self.config.cached_attention, case)

    def _prefill(self, params, inputs, cache):
        out = qwen.forward(self.graph, params, inputs, cache, logits=False)
        logits = qwen.unembed(self.graph, params, out.hidden[:, -1])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), out.cache


def _repeated(inputs: qwen.Inputs, rows: int) -> qwen.Inputs:
    """The same row several times; its pictures stay as they are, once."""
    return qwen.Inputs(
        ids=np.repeat(inputs.ids, rows, 0),
        positions=np.repeat(inputs.positions, rows, 1),
        segments=np.repeat(inputs.segments, rows, 0),
        image_index=np.repeat(inputs.image_index, rows, 0),
        vision=inputs.vision,
    )


def _compiled(function, *arguments, donate: int | None = None):
    began = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=() if donate is None else donate)
    call = jitted.lower(*arguments).compile()
    return call, time.perf_counter() - began
