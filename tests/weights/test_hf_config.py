"""config.json from anybody: a value is read, or named in a ValueError; nothing else comes out."""

import copy
import json

import pytest

from mmsr_jax.model.config import preset
from mmsr_jax.weights import hf, hf_config

VALUES = (
    None, "", "7", "auto", "float64", [], [1], [-1], ["a"], {}, {"a": 1}, True, -1, 0, 1.5,
    10**9, 10**30, -(10**12), float("nan"), float("inf"),
)  # fmt: skip


def flat() -> dict:
    return json.loads(json.dumps(hf_config.flat(preset("7b"), "bfloat16")))


def nested() -> dict:
    outer = flat()
    inner = {name: outer.pop(name) for name in list(outer) if name not in OUTER}
    return outer | {"text_config": inner}


OUTER = ("architectures", "model_type", "vision_config", "torch_dtype", "image_token_id")
MORE = (
    ("quantization_config",), ("text_config",), ("dtype",), ("rope_parameters",), ("head_dim",),
    ("vision_config", "rope_parameters"), ("vision_config", "in_channels"),
)  # fmt: skip


def places(record: dict, above: tuple[str, ...] = ()):
    for name, value in record.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


@pytest.mark.parametrize("layout", [flat, nested])
def test_any_value_anywhere(layout, tmp_path):
    base, path, refused = layout(), tmp_path / "config.json", 0
    for place in [*places(base), *MORE]:
        for value in VALUES:
            changed = copy.deepcopy(base)
            node = changed
            for name in place[:-1]:
                node = node[name]
            node[place[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                found = hf_config.read(tmp_path)
            except ValueError:
                refused += 1
                continue
            sizes = (found.text.layers, found.text.vocab_size, found.vision.depth)
            assert all(type(size) is int and size > 0 for size in sizes), (place, value)
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, .* 1 to 1000 "),
        ({"vocab_size": "152064"}, "vocab_size is '152064'"),
        ({"vision_config": [3]}, r"vision_config is \[3\], an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 64}}, "mrope_section is 64, a list"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [64]}}, "is not of three axes"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"image_token_id": 2**31}, "image_token_id is 2147483648"),
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(flat() | change))
    with pytest.raises(ValueError, match=message):
        hf_config.read(tmp_path)


def test_a_config_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="no JSON"):
        hf_config.read(tmp_path)


def test_a_file_without_words_is_a_stranger(plain, tmp_path):
    """Metadata may be null; an export beside such a file is refused, not broken off."""
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="neither empty nor an earlier export"):
        hf.save(plain.params(), plain.model, tmp_path)
