"""Which implementation looks at the pages of the cache, by platform and shape."""

import dataclasses
import logging

import pytest

from mmsr_jax.model.attention.cached import CachedCase, choose_cached
from mmsr_jax.model.config import preset


def a_case(platform="tpu", dtype="bfloat16", head_dim=128, length=1, page=32, kv_heads=4, **gpu):
    return CachedCase(platform, dtype, 7 * kv_heads, kv_heads, head_dim, length, page, **gpu)


@pytest.mark.parametrize(
    "name, which",
    [
        ("xla", a_case("cpu")),
        ("ragged", a_case()),
        ("ragged", a_case(length=256, kv_heads=1)),
        ("xla", a_case(dtype="float32")),
        ("xla", a_case(head_dim=32)),
        ("xla", a_case(kv_heads=3)),
        ("paged", a_case("gpu")),
        ("paged", a_case("gpu", capability="9.0", kv_heads=3)),
        ("xla", a_case("gpu", length=256)),
        ("xla", a_case("gpu", "float32")),
        ("xla", a_case("gpu", page=24)),
        ("xla", a_case("gpu", capability="7.5")),
    ],
)
def test_auto_chooses_by_platform_and_shape(name, which):
    assert choose_cached("auto", which) == name


def test_what_is_asked_for_is_taken_or_refused():
    assert choose_cached("paged", a_case("gpu", "float32", length=8)) == "paged"
    assert choose_cached("ragged", a_case(dtype="float32")) == "ragged"
    assert choose_cached("xla", a_case()) == "xla"
    for wanted, which, reason in [
        ("ragged", a_case("cpu"), "runs on TPU, and this program is for cpu"),
        ("ragged", a_case(dtype="float16"), "the model's dtype is float16"),
        ("ragged", a_case(head_dim=64), "must be 128 wide, they are 64"),
        ("ragged", a_case(kv_heads=3), "3 key-value heads of a device do not fill"),
        ("ragged", a_case(kv_heads=6, dtype="float32"), "6 key-value heads"),
        ("paged", a_case(), "runs on GPU, and this program is for tpu"),
        ("paged", a_case("gpu", capability="gfx90a"), "written for CUDA, this GPU is gfx90a"),
        ("paged", a_case("gpu", head_dim=80), "power of two from 16 to 256 wide, they are 80"),
        ("paged", a_case("gpu", page=24), "it has 24 slots and 6144 bytes"),
        ("paged", a_case("gpu", page=256), "it has 256 slots and 65536 bytes"),
    ]:
        with pytest.raises(ValueError, match=f"cached_attention='{wanted}'.*{reason}.*'auto'"):
            choose_cached(wanted, which)
    with pytest.raises(ValueError, match="cached_attention 'flash' is none of auto, xla, ragged"):
        dataclasses.replace(preset("tiny"), cached_attention="flash")


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            choose_cached("auto", a_case(page=8192))
    assert caplog.text.count("cached attention ragged") == 1 and "8192" in caplog.text
