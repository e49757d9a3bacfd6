"""config.json of a checkpoint: read in either layout, written in the published flat one."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from mmsr_jax.model.config import ModelConfig, TextConfig, VisionConfig

_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "eos_token_id",
)
_MOST = 10**7  # of any one size; beyond it arrays only overflow
_MOST_LAYERS = 1000  # the tensors that a config promises are listed before any is read


@dataclasses.dataclass(frozen=True)
class _Record:
    """A JSON object out of a config.json that anybody may have written."""

    path: pathlib.Path
    values: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def record(self, *names: str) -> "_Record":
        """The first of these objects that is there and not empty, else an empty one."""
        for name in names:
            if found := self.get(name):
                if not isinstance(found, dict):
                    raise ValueError(f"{self.path}: {name} is {found!r}, an object is needed")
                return _Record(self.path, found)
        return _Record(self.path, {})

    def whole(self, name: str, default: int | None = None, most: int = _MOST) -> int:
        return self._whole(name, self._need(name, default), 1, most)

    def wholes(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        found = self._need(name, default)
        if not isinstance(found, list | tuple):
            raise ValueError(f"{self.path}: {name} is {found!r}, a list is needed")
        return tuple(self._whole(name, value, 0, _MOST) for value in found)

    def number(self, name: str, default: float | None = None) -> float:
        found = self._need(name, default)
        fits = isinstance(found, int | float) and not isinstance(found, bool)
        if not fits or not 0 < found < math.inf:
            raise ValueError(f"{self.path}: {name} is {found!r}, a number above 0 is needed")
        return float(found)

    def _need(self, name: str, default: Any) -> Any:
        found = self.get(name, default)
        if found is None:
            raise ValueError(f"{self.path} does not say {name}")
        return found

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            raise ValueError(
                f"{self.path}: {name} is {value!r}, a whole number from {least} to {most} is needed"
            )
        return value


def read(folder: pathlib.Path | str) -> ModelConfig:
    """The model that `folder/config.json` describes, to be computed in the dtype it was saved in.

    Raises:
        ValueError: no config.json, another architecture, quantised weights, or a size that is not
            there or cannot be one. Of the language model nothing is guessed: the class defaults
            of the original code differ from every published size.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no config.json: it is no checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    raw = _Record(path, values if isinstance(values, dict) else {})
    if (kind := raw.get("model_type")) != "qwen2_5_vl":
        names = raw.get("architectures")
        names = ", ".join(map(str, names)) if isinstance(names, list) else ""
        raise ValueError(
            f"{path} is of model_type {kind!r}{f' ({names})' if names else ''}; only Qwen2.5-VL "
            "('qwen2_5_vl') is known, such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if raw.get("quantization_config"):
        method = raw.record("quantization_config").get("quant_method")
        raise ValueError(f"{path} is quantised ({method}): take the unquantised checkpoint")
    nested = raw.record("text_config")
    text, vision = nested if nested.values else raw, raw.record("vision_config")

    rope = text.record("rope_parameters", "rope_scaling")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise ValueError(
            f"{path} asks for {kind!r} scaling of rotary positions, which is not built here: "
            "logits would differ at every position; take the config without it"
        )
    if text.get("use_sliding_window"):
        raise ValueError(f"{path} asks for sliding windows, which no published size uses")
    for record in (text, vision):
        if (activation := record.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"{path} asks for activation {activation!r}, only silu is known")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16"
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"{path}: dtype is {dtype!r}, not bfloat16, float16 or float32")
    hidden, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    tokens = {name: raw.get(name, text.get(name)) for name in _TOKENS}
    tokens = {name: value for name, value in tokens.items() if isinstance(value, int)}
    for name, value in tokens.items():
        if not 0 <= value < 2**31:
            raise ValueError(f"{path}: {name} is {value}, which is no id of a token")
    return ModelConfig(
        text=TextConfig(
            vocab_size=text.whole("vocab_size"),
            hidden=hidden,
            layers=text.whole("num_hidden_layers", most=_MOST_LAYERS),
            heads=heads,
            kv_heads=text.whole("num_key_value_heads"),
            head_dim=text.whole("head_dim", max(1, hidden // heads)),
            intermediate=text.whole("intermediate_size"),
            mrope_section=rope.wholes("mrope_section"),
            rope_theta=_Record(path, {**text.values, **rope.values}).number("rope_theta"),
            norm_eps=text.number("rms_norm_eps"),
            # Between 4.52 and 5 the outer word may stay false where the inner one is true.
            tied=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        ),
        # Until 4.51 transformers saved of the tower only what differs from its class. No published
        # tower is as wide as the class says, so the width is always there.
        vision=VisionConfig(
            depth=vision.whole("depth", 32, most=_MOST_LAYERS),
            hidden=vision.whole("hidden_size"),
            heads=vision.whole("num_heads", 16),
            intermediate=vision.whole("intermediate_size", 3420),
            out_hidden=vision.whole("out_hidden_size", 3584),
            full_attention_layers=vision.wholes("fullatt_block_indexes", (7, 15, 23, 31)),
            patch_size=vision.whole("patch_size", 14),
            temporal_patch_size=vision.whole("temporal_patch_size", 2),
            in_channels=vision.whole("in_channels", vision.get("in_chans", 3)),
            merge_size=vision.whole("spatial_merge_size", 2),
            window_size=vision.whole("window_size", 112),
            rope_theta=vision.record("rope_parameters").number("rope_theta", 1e4),
        ),
        dtype=dtype,
        **tokens,
    )


def flat(config: ModelConfig, dtype: str, max_positions: int = 128000) -> dict[str, Any]:
    """The flat layout of the published checkpoints, which transformers and vLLM read.

    Raises:
        ValueError: a size that the original code derives from others, and this one differs.
    """
    text, vision = config.text, config.vision
    for name, value, fixed in (
        ("text.head_dim", text.head_dim, text.hidden / text.heads),
        ("vision.rope_theta", vision.rope_theta, 1e4),
        ("vision.norm_eps", vision.norm_eps, 1e-6),
    ):
        if value != fixed:
            raise ValueError(f"{name} is {value:g}; published checkpoints can only have {fixed:g}")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **{name: getattr(config, name) for name in _TOKENS},
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": text.hidden,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": max_positions,
        "max_window_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "sliding_window": 32768,
        "tie_word_embeddings": text.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_heads": vision.heads,
            "in_chans": vision.in_channels,
            "out_hidden_size": vision.out_hidden,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.merge_size,
            "spatial_patch_size": vision.patch_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "tokens_per_second": 2,
            "temporal_patch_size": vision.temporal_patch_size,
        },
        "vocab_size": text.vocab_size,
    }
