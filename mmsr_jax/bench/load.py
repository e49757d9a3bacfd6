"""`mmsr bench load`: a checkpoint of random weights onto a mesh: seconds, and peak memory.

The load is compared with merely reading the same files, both with a cold page cache.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmsr_jax.model.config import ModelConfig, preset
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.weights import hf, hf_config, hf_files, hf_write

CHILD = "import sys; from mmsr_jax.bench import load; load.child(*sys.argv[1:])"


def run(
    preset_name: str = "3b",
    devices: int = 4,
    *,
    tensor: int = 1,
    folder: str | None = None,
    file_bytes: int = 2 * 10**9,
    config: ModelConfig | None = None,
) -> dict:
    """Writes a bf16 checkpoint, loads it in a fresh process, and removes it.

    Args:
        preset_name: whose sizes; `config` instead of it.
        devices: of the CPU mesh (fsdp = devices / tensor); all live in this machine's memory.
        tensor: size of the mesh axis that splits heads and mlp.
        folder: where the checkpoint may lie; None is the temporary folder of the system.
        file_bytes: size of the files it is cut into.

    Returns: figures in bytes and seconds. `peak_rss` is the process's, `baseline_rss` its peak
        before the load (interpreter, jax); `bound` is the parameters and one file. `ratio` is
        the time to read the files by that to load them.

    Raises:
        ValueError: no such preset, or devices that do not divide.
    """
    config = preset(preset_name) if config is None else config
    if devices < 1 or devices % tensor:
        raise ValueError(f"{devices} devices do not divide into tensor {tensor}")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        began = time.perf_counter()
        _random(config, pathlib.Path(made), file_bytes)
        wrote = time.perf_counter() - began
        flags = [
            flag
            for flag in os.environ.get("XLA_FLAGS", "").split()
            if not flag.startswith("--xla_force_host_platform_device_count")
        ]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-c", CHILD, made, str(tensor)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the loading process failed:\n{done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
    return {"preset": preset_name, "devices": devices, "tensor": tensor, "write": wrote} | figures


def table(figures: dict) -> str:
    """The figures of `run` for a reader."""
    gb = {name: figures[name] / 1e9 for name in ("parameter_bytes", "held_bytes", "largest_file")}
    grown = (figures["peak_rss"] - figures["baseline_rss"]) / 1e9
    return (
        f"{figures['parameters']:,} parameters, {gb['parameter_bytes']:.2f} GB in "
        f"{figures['files']} files, onto {figures['devices']} CPU devices\n"
        f"load  {figures['load']:7.1f} s   reading the files alone {figures['read']:.1f} s, "
        f"ratio {figures['ratio']:.2f}\n"
        f"peak  {figures['peak_rss'] / 1e9:7.2f} GB  of it the load {grown:.2f} GB; "
        f"parameters held {gb['held_bytes']:.2f} GB, one file {gb['largest_file']:.2f} GB\n"
        f"sum of all bits as in the files: {'yes' if figures['same_numbers'] else 'NO'}"
    )


def child(folder: str, tensor: str) -> None:
    """Loads the checkpoint and prints the figures as one line of JSON."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    mesh = make_mesh(MeshConfig(tensor=int(tensor)))
    jax.block_until_ready(jax.device_put(np.zeros(4), jax.devices()[-1]))
    baseline = _peak()
    _forget(files)
    began = time.perf_counter()
    _read(files)
    read = time.perf_counter() - began
    _forget(files)
    began = time.perf_counter()
    params = jax.block_until_ready(hf.load(folder, mesh=mesh, dtype="bfloat16").params)
    load = time.perf_counter() - began
    peak = _peak()
    leaves = jax.tree.leaves(params)
    held = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
    largest = max(file.stat().st_size for file in files)
    figures = {
        "parameters": sum(leaf.size for leaf in leaves),
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        "held_bytes": held,
        "files": len(files),
        "largest_file": largest,
        "load": load,
        "read": read,
        "ratio": read / load,
        "baseline_rss": baseline,
        "peak_rss": peak,
        "bound": held + largest,
        "within_bound": peak - baseline <= held + largest,
        "same_numbers": _sum_of_params(leaves) == _sum_of_files(files),
    }
    print(json.dumps(figures))


def _random(config: ModelConfig, folder: pathlib.Path, file_bytes: int) -> None:
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(1 << 22, np.float32)).astype(jnp.bfloat16)

    def make(entry, layer, shape):
        size = int(np.prod(shape))
        start = int(rng.integers(pool.size))
        return np.resize(np.roll(pool, start)[:size], shape)

    hf_write.write_weights(folder, config, "bfloat16", file_bytes, make)
    described = hf_config.flat(config, "bfloat16")
    (folder / "config.json").write_text(json.dumps(described, indent=2))


def _peak() -> int:
    """Peak resident set of this process in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget(files: list[pathlib.Path]) -> None:
    """Asks the system to drop the files from its page cache, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: list[pathlib.Path]) -> None:
    buffer = memoryview(bytearray(1 << 24))
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _sum_of_params(leaves) -> int:
    """Of all numbers' bits: the same for the same numbers in whatever order."""
    shards = (s.data for leaf in leaves for s in leaf.addressable_shards if s.replica_id == 0)
    return sum(int(np.asarray(data).view(np.uint16).sum(dtype=np.uint64)) for data in shards)


def _sum_of_files(files: list[pathlib.Path]) -> int:
    stored = (tensor for file in files for tensor in hf_files.tensors(file))
    return sum(int(tensor.map().view(np.uint16).sum(dtype=np.uint64)) for tensor in stored)
