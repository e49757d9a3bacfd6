"""The engine's programs compiled by the TPU compiler, and what they do with the pool of pages.

The table of docs/performance.md needs libtpu (extra `tpu`), no TPU:

    JAX_PLATFORMS=cpu python -m pytest tests/engine/test_programs.py -m slow -s
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mmsr_jax.engine import steps
from mmsr_jax.engine.engine import EngineConfig
from mmsr_jax.inputs import layout
from mmsr_jax.model import cache as cache_lib
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import TextConfig, preset
from mmsr_jax.parallel import topology
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.parallel.rules import ROLLOUT_RULES, Placement
from mmsr_jax.parallel.topology import GIB, compile_for, shard_bytes, topology_mesh

needs_compiler = pytest.mark.skipif(
    not topology.has_libtpu(), reason='the TPU compiler needs libtpu: pip install "mmsr-jax[tpu]"'
)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def programs(model, engine: EngineConfig, mesh) -> dict:
    """Name -> (function, shapes of its arguments), the donated pool second, or first of two.

    As `Engine` calls them: small arrays come whole from the host.
    """
    graph, params = qwen.abstract(model, mesh, ROLLOUT_RULES)
    graph = steps.Graph(graph)
    table = -(-engine.slots // engine.page)
    pages = engine.pages or engine.rows * table
    pool = (model.text.layers * pages, engine.page, 2 * model.text.kv_heads, model.text.head_dim)
    place = Placement(mesh, ROLLOUT_RULES)
    kv = jax.ShapeDtypeStruct(pool, model.dtype, sharding=cache_lib.sharding(place, pool))
    features = jax.ShapeDtypeStruct((engine.feature_rows, model.text.hidden), model.dtype)
    rows = steps.Rows(
        *[ints(engine.rows)] * 5,
        keys=jax.ShapeDtypeStruct((engine.rows, 2), jnp.uint32),
        tables=ints(engine.rows, table),
        fresh=jax.ShapeDtypeStruct((engine.rows,), bool),
    )
    size = engine.extend_rows, engine.extend_tokens
    piece = steps.Extension(
        ids=ints(*size), positions=ints(3, *size), segments=ints(*size), feature=ints(*size),
        tables=ints(engine.extend_rows, table), lengths=ints(engine.extend_rows),
    )  # fmt: skip
    vision = layout.vision_inputs(
        [], model.vision, patches=engine.patches, pictures_bucket=engine.pictures,
        frame=engine.picture_patches,
    )  # fmt: skip
    scalar, width = jax.ShapeDtypeStruct((), jnp.float32), max(engine.rows, engine.extend_rows)

    def decode(params, kv, rows, temperature, patience):
        eos = (model.eos_token_id,)
        return steps.decode(
            graph, params, kv, (), rows, temperature, patience, eos, engine.decode_steps
        )

    def extend(params, kv, features, piece):
        return steps.extend(graph, params, kv, features, piece)

    def encode(params, features, vision, offset):
        return steps.encode(graph, params, features, vision, offset)

    def copy_pages(_, kv, source, target):
        return steps.copy_pages(kv, model.text.layers, source, target)

    return {
        "decode": (decode, (params, kv, rows, scalar, ints())),
        "extend": (extend, (params, kv, features, piece)),
        "encode": (encode, (params, features, vision, ints())),
        "copy pages": (copy_pages, (ints(), kv, ints(width), ints(width))),
    }


def compiled(model, engine, mesh, names=("decode", "extend", "encode", "copy pages")):
    """(name, what the compiler says, bytes of the donated pool on a chip) of each program."""
    made = programs(model, engine, mesh)
    for name in names:
        function, shapes = made[name]
        found = compile_for(mesh, function, *shapes, donate=(1,))
        assert found.fits, found.error
        pool = jax.tree.map(lambda leaf: shard_bytes(leaf), shapes[1])
        # Written where it lies: the pool that comes out is the one that went in.
        assert found.alias_bytes >= pool
        yield name, found, pool


SMALL = dataclasses.replace(
    preset("tiny"),
    text=TextConfig(
        vocab_size=512, hidden=256, layers=2, heads=4, kv_heads=2, head_dim=128,
        intermediate=512, mrope_section=(16, 24, 24), tied=True,
    ),
    vision=dataclasses.replace(preset("tiny").vision, out_hidden=256),
    dtype="bfloat16",
)  # fmt: skip


@needs_compiler
def test_no_program_copies_the_pool():
    """A pool much larger than all else: a second one would be seen."""
    engine = EngineConfig(rows=8, slots=256, pages=8192, extend_rows=2, feature_rows=256)
    mesh = topology_mesh("v5e:2x2", MeshConfig(2, 2))
    for name, found, pool in compiled(SMALL, engine, mesh, ("decode", "extend", "copy pages")):
        assert pool == 2 * 8192 * 32 * 2 * 128 * 2
        assert found.temporary_bytes < 0.1 * pool, (name, str(found))


SERVING = EngineConfig(
    rows=64, slots=4096, turn_tokens=512, extend_rows=16, extend_tokens=128, patches=4096,
    pictures=16, picture_patches=1024, feature_rows=16384,
)  # fmt: skip


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "name, chips, fsdp, tensor, rows, attention",
    [
        ("7b", "v5e:2x2", 1, 4, 32, "auto"),
        ("7b", "v5e:2x4", 2, 4, 64, "auto"),
        ("7b", "v5e:2x4", 2, 4, 64, "xla"),
        ("7b", "v5p:2x2x1", 1, 4, 128, "auto"),
        ("3b", "v5e:2x2", 2, 2, 64, "auto"),
    ],
)
def test_the_programs_of_a_size_compile_and_fit(name, chips, fsdp, tensor, rows, attention):
    model = dataclasses.replace(
        preset(name), param_dtype="bfloat16", cached_attention=attention, attention="auto"
    )
    engine = dataclasses.replace(SERVING, rows=rows)
    mesh = topology_mesh(chips, MeshConfig(fsdp, tensor))
    print()
    for program, found, pool in compiled(model, engine, mesh):
        print(
            f"| {name} | {chips} | {fsdp} x {tensor} | {rows} | {attention} | {program} | "
            f"{found.argument_bytes / GIB:.2f} | {pool / GIB:.2f} | "
            f"{found.temporary_bytes / GIB:.2f} | **{found.bytes / GIB:.2f}** | "
            f"{found.flops / 1e12:.2f} | {found.seconds:.0f} |"
        )
        if attention == "auto" and program != "encode":
            assert found.temporary_bytes < 0.2 * pool
