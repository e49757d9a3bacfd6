"""config.json of a checkpoint: read in either layout, written in the published flat one."""

import json
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


def read(folder: pathlib.Path | str) -> ModelConfig:
    """The model that `folder/config.json` describes, to be computed in the dtype it was saved in.

    Raises:
        ValueError: no config.json, another architecture, quantised weights, or a size that is not
            there. Nothing is guessed: the class defaults of the original code differ from every
            published size.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no config.json: it is no checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "qwen2_5_vl":
        names = ", ".join(raw.get("architectures") or ()) if isinstance(raw, dict) else ""
        raise ValueError(
            f"{path} is of model_type {kind!r}{f' ({names})' if names else ''}; only Qwen2.5-VL "
            "('qwen2_5_vl') is known, such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantised ({method}): take the unquantised checkpoint")
    text, vision = raw.get("text_config") or raw, raw.get("vision_config") or {}

    def need(record: dict[str, Any], *names: str):
        for name in names:
            if record.get(name) is not None:
                return record[name]
        raise ValueError(f"{path} does not say {' or '.join(names)}")

    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise ValueError(
            f"{path} asks for {kind!r} scaling of rotary positions, which is not built here: "
            "logits would differ at every position; take the config without it"
        )
    if text.get("use_sliding_window"):
        raise ValueError(f"{path} asks for sliding windows, which no published size uses")
    for record in (text, vision):
        if record.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{path} asks for activation {record['hidden_act']!r}, only silu is known"
            )
    hidden, heads = need(text, "hidden_size"), need(text, "num_attention_heads")
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16"
    tokens = {name: raw.get(name, text.get(name)) for name in _TOKENS}
    vision_rope = vision.get("rope_parameters") or {}
    return ModelConfig(
        text=TextConfig(
            vocab_size=need(text, "vocab_size"),
            hidden=hidden,
            layers=need(text, "num_hidden_layers"),
            heads=heads,
            kv_heads=need(text, "num_key_value_heads"),
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate=need(text, "intermediate_size"),
            mrope_section=tuple(need(rope, "mrope_section")),
            rope_theta=float(need({**text, **rope}, "rope_theta")),
            norm_eps=float(need(text, "rms_norm_eps")),
            tied=bool(tied),
        ),
        vision=VisionConfig(
            depth=need(vision, "depth"),
            hidden=need(vision, "hidden_size"),
            heads=need(vision, "num_heads"),
            intermediate=need(vision, "intermediate_size"),
            out_hidden=need(vision, "out_hidden_size"),
            full_attention_layers=tuple(need(vision, "fullatt_block_indexes")),
            patch_size=need(vision, "patch_size", "spatial_patch_size"),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_channels") or vision.get("in_chans") or 3,
            merge_size=vision.get("spatial_merge_size", 2),
            window_size=need(vision, "window_size"),
            rope_theta=float(vision_rope.get("rope_theta", 1e4)),
        ),
        dtype=dtype,
        **{name: value for name, value in tokens.items() if isinstance(value, int)},
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
