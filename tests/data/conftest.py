"""One small prepared dataset that the tests of this folder share."""

import pytest

from mmsr_jax.data.flags.world import FlagsConfig

SMALL = FlagsConfig(
    known=4, unknown=3, unfamiliar=2, never_shown=3, train_pictures=3, test_pictures=2
)


@pytest.fixture(scope="session")
def small() -> FlagsConfig:
    return SMALL


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("datasets"))
