"""Programs compiled by the TPU compiler for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmsr_jax.parallel import topology
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.parallel.topology import compile_for, shard_bytes, topology_mesh

needs_compiler = pytest.mark.skipif(
    not topology.has_libtpu(), reason='the TPU compiler needs libtpu: pip install "mmsr-jax[tpu]"'
)


def test_bytes_of_a_shard():
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    split = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    whole = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    bare = jax.ShapeDtypeStruct((5,), jnp.int8)
    assert shard_bytes({"a": split, "b": [whole, bare]}) == 2 * 6 * 4 + 3 * 2 + 5


def test_without_the_compiler_the_cure_is_named(monkeypatch):
    from jax.experimental import topologies

    def absent(**_):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    with pytest.raises(ValueError, match=r'needs libtpu.*pip install "mmsr-jax\[tpu\]"'):
        topology_mesh("v5e:2x4", MeshConfig())
    monkeypatch.setattr(topology, "has_libtpu", lambda: True)
    with pytest.raises(ValueError, match="no topology 'v5e:2x4': no plugin"):
        topology_mesh("v5e:2x4", MeshConfig())


def test_collectives_are_counted_once_each():
    text = """
      %a = f32[8] all-gather-start(%x), dimensions={0}
      %b = f32[8] all-gather-done(%a)
      %c = f32[8] all-reduce(%b)
    """
    assert topology._collectives(text) == {"all-gather": 1, "all-reduce": 1}


@needs_compiler
def test_a_product_compiled_for_a_pod():
    mesh = topology_mesh("v5e:2x4", MeshConfig(fsdp=4, tensor=2))
    assert mesh.devices.flat[0].platform == "tpu" and mesh.shape == {"fsdp": 4, "tensor": 2}
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    found = compile_for(mesh, jnp.dot, x, w)
    assert found.fits and found.devices == 8 and found.device_kind == "TPU v5 lite"
    assert found.argument_bytes == 256 * 512 * 2 + 128 * 256 * 2
    assert found.flops == 2 * 1024 * 512 * 256 / 8 and found.collectives["all-gather"] == 1
    assert "8 x TPU v5 lite" in str(found)
    reused = compile_for(mesh, lambda x: x + 1, x, donate=(0,))
    assert reused.alias_bytes == reused.output_bytes == 256 * 512 * 2
    assert reused.bytes == reused.argument_bytes + reused.temporary_bytes


@needs_compiler
def test_what_does_not_fit_is_an_answer():
    mesh = topology_mesh("v5e:2x2", MeshConfig())
    large = jax.ShapeDtypeStruct((6, 2**30), jnp.float32)
    found = compile_for(mesh, lambda x: x * 2, large)
    assert not found.fits and "hbm" in found.error.lower() and "does not fit" in str(found)


@needs_compiler
def test_unknown_topologies_and_sizes_that_clash():
    with pytest.raises(ValueError, match="no topology 'v5e:banana'"):
        topology_mesh("v5e:banana", MeshConfig())
    with pytest.raises(ValueError, match="asks for 3 devices, there are 8"):
        topology_mesh("v5e:2x4", MeshConfig(fsdp=3))
