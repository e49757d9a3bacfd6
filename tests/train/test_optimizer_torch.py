"""The optimiser beside torch: clip, AdamW and a schedule, over steps good and bad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step
from mmsr_jax.train.optimizer import OptimizerConfig, optimizer, schedule

STEPS = 12
CONFIG = OptimizerConfig(
    learning_rate=0.05, schedule="cosine", warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0
)


def gradients(bad: frozenset[int]):
    """Larger and smaller than the clip; not finite at the steps `bad`."""
    rng = np.random.default_rng(0)
    for number in range(STEPS):
        size = rng.choice([0.1, 3.0])
        kernel = (size * rng.normal(size=(3, 2))).astype(np.float32)
        scale = (size * rng.normal(size=3)).astype(np.float32)
        if number in bad:
            scale[1] = np.nan
        yield {"kernel": kernel, "scale": scale}


def start():
    rng = np.random.default_rng(1)
    kernel, scale = rng.normal(size=(3, 2)), rng.normal(size=3)
    return {"kernel": kernel.astype(np.float32), "scale": scale.astype(np.float32)}


def torchs(bad: frozenset[int]):
    """As trainers in torch do it: no step when the norm is not finite, the clock goes on."""
    p = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start().items()}
    groups = [
        {"params": [p["kernel"]], "weight_decay": CONFIG.weight_decay},
        {"params": [p["scale"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
    rate = schedule(CONFIG, STEPS)
    clock = torch.optim.lr_scheduler.LambdaLR(adam, lambda number: float(rate(number)))
    for grads in gradients(bad):
        for name, value in grads.items():
            p[name].grad = torch.tensor(value)
        norm = torch.nn.utils.clip_grad_norm_(p.values(), CONFIG.max_grad_norm)
        if torch.isfinite(norm):
            adam.step()
        clock.step()
    return {name: value.detach().numpy() for name, value in p.items()}


@pytest.mark.parametrize("bad", [frozenset(), frozenset({0}), frozenset({3, 4, 8})])
def test_updates_are_those_of_torch(bad):
    transform = optimizer(CONFIG, STEPS)
    state = state_lib.create(jax.tree.map(jnp.asarray, start()), transform)
    for number, grads in enumerate(gradients(bad)):
        state, measured = step.apply(transform, state, grads)
        assert bool(measured["skipped"]) == (number in bad)
    for name, expected in torchs(bad).items():
        np.testing.assert_allclose(state.params[name], expected, atol=2e-6)


def test_weights_are_not_trained_in_half_precision():
    """1 + 2e-6 is 1 in bfloat16: AdamW at the paper's learning rate would change nothing."""
    half = {"kernel": jnp.ones((3, 2), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"kernel is bfloat16.*model\.param_dtype"):
        state_lib.create(half, optimizer(OptimizerConfig(learning_rate=2e-6), STEPS))
