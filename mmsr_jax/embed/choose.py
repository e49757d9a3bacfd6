"""An embedder by its name."""

import json
import pathlib

from mmsr_jax.tools.index.embed import Embedder
from mmsr_jax.tools.index.embed_hash import HashEmbedder

EMBEDDERS = ("hash", "qwen2_5_vl")


def embedder(name: str, weights: str = "") -> Embedder:
    """Makes the embedder `name`.

    Args:
        weights: folder or hub id of a checkpoint, for those that need one.

    Raises:
        ValueError: no such embedder, weights missing or given in vain, or of a model that is not
            supported (CLIP and SigLIP).
    """
    if name == "hash":
        if weights:
            raise ValueError(f"pictures by hash need no weights, {weights} would not be used")
        return HashEmbedder()
    if name in ("clip", "siglip", "siglip2"):
        raise ValueError(_unsupported(name))
    if name != "qwen2_5_vl":
        raise ValueError(f"no embedder {name!r}, only {', '.join(EMBEDDERS)}")
    if not weights:
        raise ValueError(
            "pictures by qwen2_5_vl need --weights: a folder, or a hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )
    kind = _kind(pathlib.Path(weights))
    if kind.startswith(("clip", "siglip")):
        raise ValueError(f"{weights} is a {kind} model; {_unsupported(kind)}")
    from mmsr_jax.embed.qwen2_5_vl import VisionEmbedder  # jax: only where it is asked for

    return VisionEmbedder(weights)


def _unsupported(name: str) -> str:
    return (
        f"pictures by {name} are not supported: transformers 5 has no flax towers, and there is "
        f"no port of them here; take one of {', '.join(EMBEDDERS)}"
    )


def _kind(folder: pathlib.Path) -> str:
    """`model_type` of a folder's config.json; "" when there is none to read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(found.get("model_type", "")) if isinstance(found, dict) else ""
