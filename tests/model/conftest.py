"""What tests of the model share."""

import jax
import pytest
from jax.sharding import AbstractMesh


@pytest.fixture
def abstract_gpu():
    """A GPU that is not there, for lowering: from jax 0.12 on Triton's asks which one it is."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield
