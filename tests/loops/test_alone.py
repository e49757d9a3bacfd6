"""Two processes never work in one folder."""

import subprocess
import sys

import pytest

from mmsr_jax.cli.endings import is_mistake
from mmsr_jax.logs import RunLog
from mmsr_jax.loops import run as loop
from mmsr_jax.loops.alone import alone

HOLD = """
import pathlib, sys
from mmsr_jax.loops.alone import alone

with alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_ended(small, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == b"held\n"
        with RunLog(folder) as log, pytest.raises(ValueError, match="another process") as caught:
            loop.run(small, folder, log)
        assert is_mistake(caught.value) and not list(folder.iterdir())
        child.kill()
    with alone(folder):
        pass
