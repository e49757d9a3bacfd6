"""An embedder by its name."""

import json
import pathlib

from mmsr_jax.tools.index.embed import Embedder
from mmsr_jax.tools.index.embed_hash import HashEmbedder

TOWERS = ("clip", "siglip")
EMBEDDERS = ("hash", "qwen2_5_vl", *TOWERS)
EXAMPLES = {
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "clip": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
}


def embedder(name: str, weights: str = "") -> Embedder:
    """Makes the embedder `name`.

    Args:
        weights: folder or hub id of a checkpoint, for those that need one.

    Raises:
        ValueError: no such embedder, weights missing or given in vain, or of another model.
    """
    if name == "hash":
        if weights:
            raise ValueError(f"pictures by hash need no weights, {weights} would not be used")
        return HashEmbedder()
    if name == "siglip2":
        raise ValueError(
            "pictures by siglip2 (NaFlex) are not supported; SigLIP 2 checkpoints of one picture "
            "size, such as google/siglip2-base-patch16-224, are read by siglip"
        )
    if name not in EMBEDDERS:
        raise ValueError(f"no embedder {name!r}, only {', '.join(EMBEDDERS)}")
    if not weights:
        raise ValueError(
            f"pictures by {name} need --weights: a folder, or a hub id such as {EXAMPLES[name]}"
        )
    # jax: only where it is asked for
    if name in TOWERS:
        from mmsr_jax.embed.image_tower import TowerEmbedder

        return TowerEmbedder(name, weights)
    kind = _kind(pathlib.Path(weights))
    for other in TOWERS:
        if kind in (other, f"{other}_vision_model"):
            raise ValueError(f"{weights} is a {kind} model: its pictures are embedded by {other}")
    from mmsr_jax.embed.qwen2_5_vl import VisionEmbedder

    return VisionEmbedder(weights)


def _kind(folder: pathlib.Path) -> str:
    """`model_type` of a folder's config.json; "" when there is none to read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(found.get("model_type", "")) if isinstance(found, dict) else ""
