"""Quick compilation for all tests here; the worst figures of a run, shown at its end."""

import jax
import pytest
import torch

WORST = pytest.StashKey[dict[str, tuple[float, str]]]()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling takes nearly all of the time of these tests; the numbers stay the same."""
    torch.set_num_threads(1)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_configure(config):
    config.stash[WORST] = {}


@pytest.fixture
def figure(request):
    """figure(name, value): kept when it is the largest so far, with the test that gave it."""

    def keep(name: str, value: float) -> float:
        worst = request.config.stash[WORST]
        worst[name] = max(worst.get(name, (-1.0, "")), (float(value), request.node.name))
        return float(value)

    return keep


def pytest_terminal_summary(terminalreporter, config):
    for name, (value, test) in sorted(config.stash[WORST].items()):
        terminalreporter.write_line(f"worst {name}: {value:.2e} ({test})")
