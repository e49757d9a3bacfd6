"""The engine over several devices, in a process that has them."""

import os
import pathlib
import subprocess
import sys


def test_four_devices():
    # Cached programs with several CPU devices can deadlock: no persistent cache here.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    file = pathlib.Path(__file__).parent / "four_devices_engine.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
