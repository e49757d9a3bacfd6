"""Every implementation of attention against the reference, forward and gradients."""

import dataclasses
import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.attention import attend, bind, choose, cudnn, segment_mask, splash, triton
from mmsr_jax.model.attention.dispatch import kv_copies
from mmsr_jax.model.config import preset
from mmsr_jax.parallel.rules import Placement
from mmsr_jax.types import Picture

# (positions, query heads, key-value heads, head width, causal)
CASES = [(256, 4, 2, 32, True), (100, 6, 2, 80, True), (150, 2, 2, 80, False), (40, 4, 1, 16, True)]
ON_GPU = jax.default_backend() == "gpu"


def example(length, heads, kv_heads, size, causal, dtype="float32", packed=True):
    """q, k, v, segments of three rows: packed, half empty, full; and a weight for each output."""
    rng = np.random.default_rng(length)

    def draw(count):
        return jnp.asarray(rng.normal(size=(3, length, count, size)), dtype)

    segments = np.ones((3, length), np.int32)
    if causal and packed:
        segments[0] = 1 + np.arange(length) // (length // 3)
    segments[1, length // 2 :] = 0
    weight = draw(heads) * (segments > 0)[:, :, None, None]  # what padding sees is not defined
    return draw(heads), draw(kv_heads), draw(kv_heads), jnp.asarray(segments), weight


def value_and_gradients(function, q, k, v, segments, weight):
    def total(q, k, v):
        out = function(q, k, v, segments)
        return (out * weight).astype(jnp.float32).sum(), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(q, k, v)
    return out * (segments > 0)[:, :, None, None], *gradients


def reference(q, k, v, segments, causal):
    mask = segment_mask(segments) if causal else (segments[:, :, None] == segments[:, None, :])
    return attend(q, k, v, mask)


def equal_to_the_reference(kernel, case, tolerance, **options):
    arrays = example(*case, **options)
    found = value_and_gradients(functools.partial(kernel, causal=case[-1]), *arrays)
    exact = [x.astype(jnp.float32) if x.dtype != jnp.int32 else x for x in arrays]
    wanted = value_and_gradients(functools.partial(reference, causal=case[-1]), *exact)
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), err_msg=name)
        assert np.abs(other).max() > 0.1, name


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_reference(case):
    equal_to_the_reference(functools.partial(splash.attend, interpret=True), case, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference(case):
    equal_to_the_reference(functools.partial(triton.attend, interpret=True), case, 2e-6)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN and compiled Triton need a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [cudnn.attend, triton.attend])
def test_kernels_on_gpu_equal_the_reference(kernel, case, packed):
    equal_to_the_reference(kernel, case, 2e-2, dtype="bfloat16", packed=packed)


def test_long_rows_are_cut_into_large_blocks():
    assert splash.tiles(64) == (128, 128) and splash.tiles(700) == (768, 384)
    assert splash.tiles(4096) == (4096, 512) and splash.tiles(4097) == (4608, 512)
    assert [triton.padded(n) for n in (1, 40, 64, 128, 129)] == [32, 64, 64, 128, 256]


def test_cudnn_gets_only_rows_of_one_sequence():
    for one in ([[1, 1, 0], [2, 2, 2], [0, 0, 0]], [[3, 0, 0]]):
        assert cudnn.single(jnp.asarray(one))
    for several in ([[1, 2, 0]], [[1, 1, 1], [1, 1, 2]], [[0, 1, 1]], [[1, 0, 1]]):
        assert not cudnn.single(jnp.asarray(several))


def test_cudnn_lowers_to_its_own_calls_and_to_triton_for_packed_rows(monkeypatch, abstract_gpu):
    from jax._src.cudnn import fused_attention_stablehlo  # asks the GPU library for its version

    if not hasattr(fused_attention_stablehlo, "check_cudnn_version"):
        pytest.skip("this jax asks for cuDNN's version elsewhere: lowering needs a GPU")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    arrays = example(128, 4, 2, 80, True, dtype="bfloat16")

    def lowered(causal):
        function = functools.partial(
            value_and_gradients, functools.partial(cudnn.attend, causal=causal)
        )
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(True)
    assert "__cudnn$fmhaSoftmaxBackward" in text and "xla.gpu.triton" in text
    assert "128x128xi1" not in text, "a mask as large as the scores"
    text = lowered(False)
    assert "__cudnn$fmhaSoftmaxBackward" in text and "xla.gpu.triton" not in text


def a_case(platform="tpu", dtype="bfloat16", head_dim=128, length=4096, causal=True, **gpu):
    return choose.Case(platform, dtype, head_dim, length, causal, **gpu)


@pytest.mark.parametrize(
    "name, which",
    [
        ("xla", a_case("cpu")),
        ("xla", a_case("cpu", "float32")),
        ("splash", a_case()),
        ("splash", a_case(head_dim=80, length=1024, causal=False)),
        ("xla", a_case(head_dim=80, length=64, causal=False)),  # windows
        ("xla", a_case("tpu", "float32")),
        ("cudnn", a_case("gpu")),
        ("cudnn", a_case("gpu", head_dim=80, length=64, causal=False)),
        ("triton", a_case("gpu", head_dim=36)),
        ("xla", a_case("gpu", "float32")),
        ("cudnn", a_case("gpu", capability="12.0")),
        ("xla", a_case("gpu", capability="7.5")),
        ("xla", a_case("gpu", capability="gfx90a")),
    ],
)
def test_auto_chooses_by_platform_and_shape(name, which):
    assert choose.choose("auto", which) == name


def test_what_is_asked_for_is_taken_or_refused():
    assert choose.choose("triton", a_case("gpu", "float32")) == "triton"
    assert choose.choose("splash", a_case(length=64)) == "splash"
    for wanted, which, reason in [
        ("splash", a_case("cpu"), "runs on TPU, and this program is for cpu"),
        ("cudnn", a_case(), "runs on GPU, and this program is for tpu"),
        ("triton", a_case("cpu"), "runs on GPU"),
        ("cudnn", a_case("gpu", "float32"), "the model's dtype is float32"),
        ("cudnn", a_case("gpu", head_dim=36), "multiple of 8 up to 128 wide, they are 36"),
        ("triton", a_case("gpu", capability="7.5"), "capability 8.0 .Ampere., this GPU has 7.5"),
        ("cudnn", a_case("gpu", capability="gfx90a"), "written for CUDA, this GPU is gfx90a"),
        ("triton", a_case("gpu", head_dim=512), "up to 256 wide, they are 512"),
    ]:
        with pytest.raises(ValueError, match=f"attention='{wanted}'.*{reason}.*'auto'"):
            choose.choose(wanted, which)
    with pytest.raises(ValueError, match="attention 'flash' is none of auto, xla"):
        dataclasses.replace(preset("tiny"), attention="flash")


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose.choose("auto", a_case(length=12345))
    assert caplog.text.count("attention splash") == 1 and "12345" in caplog.text


def test_on_this_platform_a_kernel_of_another_is_refused():
    segments = jnp.ones((1, 8), jnp.int32)
    wanted = {"cpu": "splash", "gpu": "splash", "tpu": "cudnn"}[choose.platform_of(Placement())]
    with pytest.raises(ValueError, match="this program is for"):
        bind(wanted, segments, causal=True, head_dim=8, dtype="float32", place=Placement())


@pytest.mark.parametrize(
    "heads, kv_heads, shards", [(16, 2, 4), (28, 4, 7), (16, 2, 1), (12, 2, 4)]
)
def test_key_heads_are_repeated_until_every_device_has_its_own(heads, kv_heads, shards):
    copies = kv_copies(heads, kv_heads, shards)
    held = kv_heads * copies
    assert held % shards == 0 and heads % held == 0
    group, per_device = heads // kv_heads, heads // shards
    for head in range(heads):  # what a device's kernel reads is what the head belongs to
        device, local = divmod(head, per_device)
        read = device * (held // shards) + local // (per_device // (held // shards))
        assert read // copies == head // group


def test_a_model_with_splash_equals_the_reference(monkeypatch):
    """Both towers, scanned and recomputed: pictures of several windows, a packed row, padding."""
    monkeypatch.setattr(choose, "platform_of", lambda place: "tpu")
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        text=dataclasses.replace(tiny.text, layers=2),
        vision=dataclasses.replace(tiny.vision, depth=2, full_attention_layers=(1,)),
    )
    rng = np.random.default_rng(0)
    grids = (1, 4, 6), (1, 10, 6)
    pictures = [Picture(rng.normal(size=(h * w, 1176)).astype("f"), (t, h, w)) for t, h, w in grids]
    index = np.full((2, 40), -1, np.int32)
    index[0, 2:8], index[1, 10:25] = np.arange(6), 6 + np.arange(15)
    segments = np.ones((2, 40), np.int32)
    segments[1, 7:], segments[:, 35:] = 2, 0
    inputs = qwen2_5_vl.Inputs(
        rng.integers(20, 500, (2, 40)).astype(np.int32),
        np.broadcast_to(np.arange(40, dtype=np.int32), (3, 2, 40)),
        segments,
        index,
        layout.vision_inputs(pictures, config.vision),
    )
    params = qwen2_5_vl.init(config, jax.random.key(0))

    def run(attention):
        graph, _ = qwen2_5_vl.abstract(dataclasses.replace(config, attention=attention))

        def loss(params):
            logits = qwen2_5_vl.forward(graph, params, inputs).logits
            return jnp.sin(jnp.where((segments > 0)[..., None], logits, 0)).mean()

        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.value_and_grad(loss), compiler_options=quick)(params)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-3, float(np.abs(b).max())))

    jax.tree.map(close, run("splash"), run("xla"))


PROGRAM = """
import functools, jax, jax.numpy as jnp, numpy as np
from mmsr_jax.model.attention import bind, choose, splash
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import Placement

choose.platform_of = lambda place: "tpu"
splash.attend = functools.partial(splash.attend, interpret=True)
mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
rng = np.random.default_rng(0)
# Three rows for two devices, two key heads for four.
q, k, v = (jnp.asarray(rng.normal(size=(3, 128, n, 32)), jnp.float32) for n in (8, 2, 2))
at = np.arange(128)
segments = jnp.asarray(np.stack([at // 50 + 1, at < 90, at >= 0]), jnp.int32)
options = dict(causal=True, head_dim=32, dtype="float32")

def gradients(name, place):
    def total(q, k, v):
        out = bind(name, segments, place=place, **options)(q, k, v)
        return jnp.sin(out * (segments > 0)[:, :, None, None]).sum()
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

over = Placement(mesh)
text = jax.jit(bind("splash", segments, place=over, **options)).lower(q, k, v).as_text()
assert "2x128x2x32xf32" in text, "a device's share: two rows, two of eight query heads"
found, wanted = gradients("splash", over), gradients("xla", Placement())
for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))
print("same")
"""


def test_a_kernel_over_a_mesh_gives_each_device_its_rows_and_heads():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same" in done.stdout
