"""`mmsr bench model` at the smallest size, with the original beside it."""

import builtins
import dataclasses
import json

import jax.numpy as jnp
import pytest

from mmsr_jax.bench import measure, model, peer
from mmsr_jax.cli.main import main
from mmsr_jax.model import qwen2_5_vl as qwen

QUICK = ["--size", "tiny", "--inputs", "small", "--tokens", "6", "--runs", "2"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two layers a tower, and small matrices for what the device can do: compiling takes long."""
    tiny = model.SIZES["tiny"]
    tiny = dataclasses.replace(
        tiny,
        text=dataclasses.replace(tiny.text, layers=2),
        vision=dataclasses.replace(tiny.vision, depth=2, full_attention_layers=(1,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "tiny", tiny)
        patch.setattr(model, "limits", lambda dtype: measure.limits(dtype, matrix=64, megabytes=1))
        yield


def test_every_case_agrees_with_the_original_and_has_its_figures(capsys):
    assert main(["bench", "model", *QUICK, "--rows", "1", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["size"] == "tiny" and record["dtype"] == "float32"
    assert record["peer"] == "transformers on torch, cpu, sdpa"
    assert {"python", "jax", "torch", "transformers"} <= record["versions"].keys()
    assert record["device"] and record["threads"] >= 1 and record["layers"] == "apart"
    cases = record["cases"]
    assert [case["what"] for case in cases] == [
        "forward", "forward + backward", "decode, 1 rows", "decode, 3 rows",
    ]  # fmt: skip
    for case in cases:
        assert (case["tokens"], case["patches"], case["compile_s"] > 0) == (60, 92, True)
        for side in ("ours", "peer"):
            assert 0 < case[side]["min_ms"] <= case[side]["median_ms"]
            assert case[side]["runs"] == 2
        assert case["ratio"] == pytest.approx(case["peer"]["min_ms"] / case["ours"]["min_ms"])
        assert case["of_floor"] == pytest.approx(case["floor_ms"] / case["ours"]["min_ms"])
    forward, backward, one, three = cases
    assert forward["attention"] == {"text": "xla", "frames": "xla", "windows": "xla"}
    assert forward["max_difference"] < 2e-5 and backward["relative_difference"] < 1e-4
    assert backward["flops"] == 3 * forward["flops"]
    assert forward["flops_per_s"] == pytest.approx(
        forward["flops"] / forward["ours"]["min_ms"] * 1e3
    )
    assert one["equal_tokens"] == three["equal_tokens"] == 1.0
    assert three["tokens_per_s"] == pytest.approx(3e3 / three["ours"]["min_ms"])
    assert one["bytes_per_step"] < three["bytes_per_step"]


def test_a_table_without_peer(capsys):
    words = ["--peer", "none", "--parts", "decode", "--rows", "2", "--layers", "stacked"]
    assert main(["bench", "model", *QUICK, *words]) == 0
    shown = capsys.readouterr().out
    assert "layers stacked" in shown and "peer: none" in shown
    assert "decode, 2 rows" in shown and "forward + backward" not in shown
    assert "small: 60 tokens, 92 patches" in shown


def test_a_wrong_model_is_not_timed(monkeypatch, capsys):
    def off(self, hidden):
        return 1.01 * right(self, hidden)

    right = qwen.TextModel.unembed
    monkeypatch.setattr(qwen.TextModel, "unembed", off)
    monkeypatch.setattr(model, "interleave", lambda *_: pytest.fail("timed"))
    assert main(["bench", "model", *QUICK, "--parts", "forward"]) == 1
    assert "differ in the logits of small by 1.0e-02" in capsys.readouterr().err


def test_other_tokens_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(jnp, "argmax", lambda x, axis: jnp.zeros(x.shape[:-1], jnp.int32))
    monkeypatch.setattr(model, "interleave", lambda *_: pytest.fail("timed"))
    assert main(["bench", "model", *QUICK, "--parts", "decode"]) == 1
    assert "decode the same 0% of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "big"], "'big' is neither a folder nor one of m100, tiny, 3b, 7b"),
        (["--inputs", "huge"], "no input 'huge'; there are small, med, large"),
        (["--parts", "sleep"], "no part 'sleep'; there are forward, backward, decode"),
        (["--dtype", "int8"], "dtype is 'int8': float32 or bfloat16"),
        (["--peer", "vllm"], "peer 'vllm' is none of torch, none"),
        (["--layers", "mixed"], "layers 'mixed' is none of apart, stacked"),
        (["--runs", "0"], "must be at least 1"),
        (["--size", "tiny", "--attention", "flash"], "attention 'flash' is none of auto, xla"),
    ],
)
def test_mistakes_end_in_one_line(words, said, capsys):
    assert main(["bench", "model", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_no_torch(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'", name="torch")
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["bench", "model", *QUICK]) == 2
    assert "needs torch: install the extra 'test'" in capsys.readouterr().err


def test_torch_without_cuda_is_no_peer_of_an_accelerator(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="runs on gpu, and torch has no CUDA here.*--peer none"):
        peer.Peer(tmp_path, "bfloat16", "gpu")


def test_threads_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(peer.os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert peer.threads() == 2
