"""A mesh of eight devices gives the loss and the gradients of one: fsdp 4, tensor 2."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from mmsr_jax.model import lora
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.train import grpo, step
from mmsr_jax.train.assemble import assemble

CONFIG = grpo.LossConfig(kl_weight=0.1)
LORA = lora.LoRAConfig(
    rank=3, alpha=3.0, targets=("q_proj", "k_proj", "down_proj", "qkv"), vision=True
)


def test_eight_devices_compute_what_one_computes(tiny, params, pieces, tmp_path):
    """The other process compares: see eight_devices.py."""
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    found = {
        "sft": step.accumulate_sft(tiny.graph, params, step.zeros_like(params), batch),
        "grpo": step.accumulate_grpo(
            tiny.graph, params, tiny.params(1), step.zeros_like(params), batch, CONFIG,
            np.float32(1),
        ),
    }  # fmt: skip
    graph, shapes = qwen.abstract(tiny.model, lora=LORA)
    adapter = lora.init(lora.split(shapes)[1], jax.random.key(3))
    adapter = jax.tree.map(lambda x: x + 0.02, adapter)  # B is no zero
    found["lora"] = step.accumulate_grpo(
        graph, adapter, params, step.zeros_like(adapter), batch, CONFIG, np.float32(1), params,
        tiny.graph,
    )  # fmt: skip
    for name, (grads, measured) in found.items():
        leaves = {f"g{n}": np.asarray(g) for n, g in enumerate(jax.tree.leaves(grads))}
        numbers = {f"m_{k}": np.asarray(v) for k, v in measured.items()}
        np.savez(tmp_path / f"{name}.npz", **leaves, **numbers)
    environment = dict(
        os.environ,
        JAX_NUM_CPU_DEVICES="8",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles in two thirds of the time
        EXPECTED=str(tmp_path),
    )
    file = pathlib.Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
