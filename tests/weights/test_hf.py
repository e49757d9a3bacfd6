"""Checkpoints of Hugging Face in and out: to the bit, and one clear error for what is broken."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.weights import hf, hf_files, hf_write

INDEX = "model.safetensors.index.json"


def untied(config):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tied=False))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal(left, right):
    left, right = jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for (path, a), b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def exported(plain, tmp_path_factory) -> pathlib.Path:
    """Several files, float32, tied."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    hf.save(plain.params(), plain.model, folder, dtype="float32", shard_bytes=60_000)
    return folder


@pytest.fixture
def broken(exported, tmp_path) -> pathlib.Path:
    """A copy to break."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, data in contents(exported).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [60_000, 10**9])
def test_export_import_export_gives_the_same_bytes(plain, tmp_path, dtype, tied, shard_bytes):
    config = plain.model if tied else untied(plain.model)
    params = plain.params(config=config)
    first, second = tmp_path / "first", tmp_path / "second"
    hf.save(params, config, first, dtype=dtype, shard_bytes=shard_bytes)
    loaded = hf.load(first)
    assert loaded.config == dataclasses.replace(config, dtype=dtype) and loaded.folder == first
    rounded = jax.tree.map(lambda p: np.asarray(p).astype(jnp.dtype(dtype)).astype("f"), params)
    assert_equal(loaded.params, rounded)
    hf.save(loaded.params, loaded.config, second, dtype=dtype, shard_bytes=shard_bytes)
    assert contents(first) == contents(second)
    assert (len(list(first.glob("*.safetensors"))) > 2) == (first / INDEX).exists()
    assert (first / INDEX).exists() == (shard_bytes < 10**9)


def test_files_are_plain_safetensors(plain, exported):
    """Read by the library itself, and by names and layouts written out here."""
    tensors = {}
    for file in exported.glob("*.safetensors"):
        tensors |= load_file(file)
    index = json.loads((exported / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors) and "lm_head.weight" not in tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    params = jax.tree.map(np.asarray, plain.params())
    text, vision = params["text"], params["vision"]
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], text["embed"]["table"])
    q = text["layers"]["attention"]["q"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.q_proj.weight"], q["kernel"][1].reshape(48, 48).T
    )
    np.testing.assert_array_equal(
        tensors["model.layers.0.self_attn.q_proj.bias"], q["bias"][0].reshape(48)
    )
    o = text["layers"]["attention"]["o"]["kernel"]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.o_proj.weight"], o[1].reshape(48, 48).T
    )
    np.testing.assert_array_equal(
        tensors["visual.blocks.1.attn.qkv.weight"],
        vision["layers"]["qkv"]["kernel"][1].reshape(32, 96).T,
    )
    np.testing.assert_array_equal(
        tensors["visual.patch_embed.proj.weight"].reshape(32, 1176), vision["patch"]["kernel"].T
    )


def test_dtype_of_the_parameters(exported):
    loaded = hf.load(exported, dtype="bfloat16")
    assert loaded.config.param_dtype == loaded.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    whole = jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), hf.load(exported).params)
    assert_equal(loaded.params, whole)


def test_every_layout_holds_the_same_numbers(plain, exported):
    """In a process of eight devices: replicated, fsdp, tensor, both; saved from there as well."""
    environment = dict(
        os.environ,
        JAX_NUM_CPU_DEVICES="8",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",
        EXPORTED=str(exported),
    )
    file = pathlib.Path(__file__).with_name("eight_devices_hf.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_that_does_not_fit_is_in_one_message(broken):
    first, second, *_ = [f for f in sorted(broken.glob("*.safetensors")) if len(load_file(f)) > 2]
    tensors, others = load_file(first), load_file(second)
    gone, other, *_ = tensors
    del tensors[gone]
    tensors[other] = tensors[other][..., :-1].copy()
    tensors["model.surplus"] = np.zeros(3, np.float32)
    save_file(tensors, first)
    also = next(iter(others))
    del others[also]
    save_file(others, second)
    with pytest.raises(ValueError) as error:
        hf.load(broken)
    heading, *lines = str(error.value).splitlines()
    assert str(broken) in heading
    *rest, last = tensors[other].shape
    wanted = (*rest, last + 1)
    assert sorted(line.strip() for line in lines) == sorted(
        [
            f"missing {gone}",
            f"missing {also}",
            "unexpected model.surplus",
            f"misshaped {other}: {tensors[other].shape}, config wants {wanted}",
        ]
    )


def test_quantised_numbers_and_doubled_names_are_refused(exported, broken):
    name = "model.norm.weight"
    (home,) = [f for f in broken.glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(home)
    shape = tensors[name].shape
    tensors[name] = np.zeros(shape, np.int8)
    tensors["model.language_model.norm.weight"] = np.zeros(shape, np.float32)
    save_file(tensors, home)
    with pytest.raises(ValueError, match=f"twice {name}: in {home.name}"):
        hf.load(broken)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, home)
    with pytest.raises(ValueError, match=f"unreadable {name}: numbers of kind I8"):
        hf.load(broken)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(broken, keep):
    file = sorted(broken.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or no safetensors file"):
        hf.load(broken)


def test_a_corrupt_header_is_named(broken):
    file = sorted(broken.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[8:40] = os.urandom(32)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.name} is truncated or no safetensors file"):
        hf.load(broken)


def test_files_that_are_not_there(broken):
    file = sorted(broken.glob("*.safetensors"))[2]
    file.unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names {file.name}, which .* does not hold"):
        hf.load(broken)
    for text in ("{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": 3}'):
        (broken / INDEX).write_text(text)
        with pytest.raises(ValueError, match=f"{INDEX} is broken"):
            hf.load(broken)
    (broken / INDEX).unlink()
    (broken / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*pytorch_model.bin"):
        hf.load(broken)
    (broken / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hf.load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama' .Llama.*qwen2_5"),
        ({"model_type": None}, "of model_type None"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"use_sliding_window": True}, "sliding windows"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
            "'yarn' scaling of rotary positions",
        ),
        ({"num_key_value_heads": 3}, "4 heads do not divide by 3 kv_heads"),
    ],
)
def test_configs_of_other_models(broken, change, message):
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        hf.load(broken)


@pytest.mark.parametrize("text", ["", "[1]", '"qwen2_5_vl"', "{"])
def test_a_config_that_is_none(broken, text):
    (broken / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is"):
        hf.load(broken)


def test_an_export_replaces_only_an_export(plain, exported, broken):
    hf.save(plain.params(1), plain.model, broken, dtype="float32")  # an earlier export
    assert sorted(contents(broken)) == ["config.json", "model.safetensors"]
    assert_equal(hf.load(broken).params, plain.params(1))
    before = contents(broken)
    (broken / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"neither empty nor an earlier export.*notes\.txt"):
        hf.save(plain.params(), plain.model, broken)
    (broken / "notes.txt").unlink()
    save_file(load_file(broken / "model.safetensors"), broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"it holds model\.safetensors; choose another folder"):
        hf.save(plain.params(), plain.model, broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds model\.safetensors; choose another folder"):
        hf.save(plain.params(), plain.model, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it holds config\.json"):
        hf.save(plain.params(), plain.model, broken)
    assert contents(broken) == {"config.json": before["config.json"]}
    with pytest.raises(ValueError, match="is a file"):
        hf.save(plain.params(), plain.model, broken / "config.json")


def test_an_export_that_fails_leaves_what_was_there(plain, broken, monkeypatch):
    before = contents(broken)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf_write, "_published", full)
        with pytest.raises(OSError, match="No space"):
            hf.save(plain.params(), plain.model, broken)
    assert contents(broken) == before
    assert [path.name for path in broken.parent.iterdir()] == [broken.name]
    # What a killed export left behind is cleared away by the next one.
    partial = broken.with_name(".broken.mmsr-partial")
    partial.mkdir()
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    hf.save(plain.params(), plain.model, broken)
    assert [path.name for path in broken.parent.iterdir()] == [broken.name]
    partial.mkdir()
    (partial / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"is in the way: it holds thesis\.txt"):
        hf.save(plain.params(), plain.model, broken)


def test_parameters_that_are_not_the_configs(plain, tmp_path):
    params = plain.params()
    wrong = params | {"text": params["text"] | {"norm": {"scale": jnp.zeros(3)}}}
    del wrong["text"]["embed"]
    wrong["text"]["head"] = {"kernel": jnp.zeros((48, 384))}
    with pytest.raises(ValueError) as error:
        hf.save(wrong, plain.model, tmp_path / "out")
    message = str(error.value)
    assert "text.embed.table missing" in message and "text.head.kernel unexpected" in message
    assert "text.norm.scale (3,), config wants (48,)" in message
    with pytest.raises(ValueError, match="float16.*bfloat16, float32"):
        hf.save(params, plain.model, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_one_tensor_at_a_time(plain, tmp_path, monkeypatch):
    """The writer asks for a tensor only when the one before it is on the disk."""
    made = []
    write = hf_files.write

    def counting(file, shapes, code, tensors, words):
        def watched():
            for tensor in tensors:
                made.append(file.stat().st_size if file.exists() else 0)
                yield tensor

        monkeypatch.setattr("builtins.open", lambda *a, **k: _unbuffered(*a, **k))
        write(file, shapes, code, watched(), words)
        monkeypatch.undo()

    monkeypatch.setattr(hf_files, "write", counting)
    hf.save(plain.params(), plain.model, tmp_path / "out", dtype="float32")
    assert len(made) == len(load_file(tmp_path / "out" / "model.safetensors"))
    assert made == sorted(made) and made[0] < made[len(made) // 2] < made[-1]


_open = open


def _unbuffered(file, mode="r", **more):
    return _open(file, mode, **({"buffering": 0} if mode == "wb" else more))


def test_sizes_that_the_original_cannot_have(plain, tmp_path):
    text = dataclasses.replace(plain.model.text, head_dim=16, mrope_section=(2, 3, 3))
    odd = dataclasses.replace(plain.model, text=text)
    with pytest.raises(ValueError, match="head_dim is 16; published checkpoints can only have 12"):
        hf.save(plain.params(config=odd), odd, tmp_path / "out")


def test_graph_of_what_is_loaded(exported):
    loaded = hf.load(exported)
    assert loaded.graph == qwen.abstract(loaded.config)[0]
