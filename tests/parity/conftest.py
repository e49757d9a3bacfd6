"""The worst figures of a run of random models, shown at its end."""

import pytest

WORST = pytest.StashKey[dict[str, tuple[float, str]]]()


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
