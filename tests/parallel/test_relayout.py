"""Weights from one layout to another: all of them, equal to the bit, in bounded memory."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmsr_jax.parallel.relayout import relayout

HERE = pathlib.Path(__file__).parent


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_without_a_mesh_weights_stay_where_they_are(tiny):
    params = tiny.params()
    found = relayout(params, tiny.abstract[1])
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for left, right in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        assert left is right


def test_all_that_does_not_fit_is_named():
    params = {"text": {"norm": np.zeros(3, "f"), "old": np.zeros(1, "f")}, "b": np.zeros(2, "f")}
    wanted = {
        "text": {"norm": shape(4), "new": {"kernel": shape(1)}},
        "b": shape(2, dtype="bfloat16"),
        "c": shape(),
    }
    with pytest.raises(ValueError, match="do not fit the engine") as caught:
        relayout(params, wanted)
    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "b is float32[2], not bfloat16[2]",
        "c is not fed",
        "text/new/kernel is not fed",
        "text/norm is float32[3], not float32[4]",
        "text/old is surplus",
    ]


def test_eight_devices(tmp_path):
    environment = dict(
        os.environ,
        JAX_NUM_CPU_DEVICES="8",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles in two thirds of the time
    )
    file = HERE / "eight_devices_relayout.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_get_a_copy_each():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    file = str(HERE / "two_processes_relayout.py")
    running = [
        subprocess.Popen(
            [sys.executable, file, str(port), str(rank)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for rank, text in enumerate(said):
        assert f"all arrived at {rank}" in text, "\n\n".join(said)
