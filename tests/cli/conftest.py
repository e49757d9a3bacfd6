"""Commands set logging up; the next test finds it as it was."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("mmsr_jax").setLevel(logging.NOTSET)
