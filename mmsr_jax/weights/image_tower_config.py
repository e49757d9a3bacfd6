"""config.json of a CLIP or SigLIP folder: what its vision tower looks like."""

import json
import pathlib

from mmsr_jax.model.image_tower import ImageTowerConfig

# Published configs leave out what their class has by default (google/siglip-base-patch16-224 says
# of its tower nothing but its type): CLIPVisionConfig and SiglipVisionConfig of transformers 5.24.
DEFAULTS = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}
# model_type -> kind, and whether the tower is described within `vision_config`.
TYPES = {
    "clip": ("clip", True),
    "clip_vision_model": ("clip", False),
    "siglip": ("siglip", True),
    "siglip_vision_model": ("siglip", False),
}


def read(folder: pathlib.Path, dtype: str) -> ImageTowerConfig:
    """The vision tower that `folder/config.json` describes, to be computed in `dtype`.

    Raises:
        ValueError: no config.json, a model that is neither CLIP nor SigLIP, one without a vision
            tower or without a vector at its end, quantised weights, sizes that do not fit.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"{folder} holds no config.json: it is no checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found in ("clip_text_model", "siglip_text_model"):
        raise ValueError(f"{path} is of a {found}: a text tower alone, which sees no pictures")
    if found == "siglip2":
        raise ValueError(
            f"{path} is of a siglip2 (NaFlex: pictures of many sizes), which is not built here; "
            "the SigLIP 2 checkpoints of one size, such as google/siglip2-base-patch16-224, are "
            "of type siglip and can be read"
        )
    if found not in TYPES:
        raise ValueError(
            f"{path} is of model_type {found!r}; a picture tower is one of {', '.join(TYPES)}"
        )
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{path} is quantised ({method}): take the unquantised checkpoint")
    kind, within = TYPES[found]
    said = raw
    if within:
        # Where both are there, transformers reads the second, whole.
        said = raw.get("vision_config_dict") or raw.get("vision_config") or {}
        if not isinstance(said, dict):
            raise ValueError(f"{path}: vision_config is {said!r}, an object is needed")
    values = {
        name: default if said.get(name) is None else said[name]
        for name, default in DEFAULTS[kind].items()
    }
    if found == "clip":  # the whole model's counts, the tower's own is another class's
        values["projection_dim"] = raw.get("projection_dim") or 512
    if values["num_channels"] != 3:
        raise ValueError(f"{path}: {values['num_channels']} channels, pictures here have 3")
    if not values.get("vision_use_head", True):
        raise ValueError(
            f"{path}: vision_use_head is false, so the tower ends in patches and has no vector "
            "for a picture"
        )
    try:
        return ImageTowerConfig(
            kind=kind,
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            hidden=values["hidden_size"],
            layers=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            intermediate=values["intermediate_size"],
            activation=values["hidden_act"],
            norm_eps=float(values["layer_norm_eps"]),
            projection=values.get("projection_dim", 0),
            dtype=dtype,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
