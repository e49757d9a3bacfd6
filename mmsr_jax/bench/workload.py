"""What is computed: models by size, and one row of text and pictures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmsr_jax.inputs import images, layout
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import PRESETS, ModelConfig, TextConfig, VisionConfig

# About 100 million parameters: large enough for products to matter, small enough for a laptop.
M100 = ModelConfig(
    text=TextConfig(
        vocab_size=32000,
        hidden=640,
        layers=12,
        heads=10,
        kv_heads=2,
        head_dim=64,
        intermediate=2048,
        mrope_section=(8, 12, 12),
        tied=True,
    ),
    vision=VisionConfig(
        depth=8,
        hidden=384,
        heads=6,
        intermediate=1024,
        out_hidden=640,
        full_attention_layers=(3, 7),
    ),
    image_token_id=10,
    video_token_id=11,
    vision_start_token_id=12,
    vision_end_token_id=13,
    bos_token_id=0,
    eos_token_id=2,
)
SIZES = {"m100": M100, **{name: PRESETS[name] for name in ("tiny", "3b", "7b")}}

# name: (height, width) of the pictures in pixels, tokens of the row in all
ROWS = {
    "small": (((70, 98), (140, 85)), 60),
    "med": (((448, 336), (224, 308)), 317),
    "large": (((756, 1008),), 1536),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row without padding; every bucket is of exactly the size that is needed."""

    name: str
    ids: np.ndarray  # [1, T] int32
    patches: np.ndarray  # [P, patch_dim] float32
    grids: tuple[tuple[int, int, int], ...]  # (t, h, w) of each picture, in patches
    delta: int  # M-RoPE position of the next token, less the number of tokens
    inputs: qwen.Inputs  # the same for our model, in numpy


def workload(name: str, config: ModelConfig, seed: int = 0) -> Workload:
    """Text of random ids around pictures of noise.

    Raises:
        ValueError: no such row.
    """
    if name not in ROWS:
        raise ValueError(f"there is no row {name!r}; there are {', '.join(ROWS)}")
    sizes, length = ROWS[name]
    rng = np.random.default_rng(seed)
    vision, settings = config.vision, images.ImageConfig()
    pictures = [
        images.picture(
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)),
            dataclasses.replace(settings, patch_size=vision.patch_size),
        )
        for size in sizes
    ]
    merged = [len(picture.patches) // vision.merge_size**2 for picture in pictures]
    special = {getattr(config, f.name) for f in dataclasses.fields(config) if "token_id" in f.name}
    plain = np.setdiff1d(np.arange(config.text.vocab_size), list(special))
    text = length - sum(merged) - 2 * len(merged)
    ids: list[int] = []
    for count in merged:
        ids += rng.choice(plain, text // (len(merged) + 1)).tolist()
        ids += [config.vision_start_token_id, *[config.image_token_id] * count]
        ids.append(config.vision_end_token_id)
    ids += rng.choice(plain, length - len(ids)).tolist()
    row = np.asarray(ids, np.int32)
    grids = tuple(picture.grid for picture in pictures)
    positions, delta = layout.positions(row, grids, config)
    index = np.full(length, -1, np.int32)
    index[row == config.image_token_id] = np.arange(sum(merged))
    side = vision.window_tokens * vision.merge_size
    planned = layout.vision_inputs(
        pictures,
        vision,
        patches=sum(len(picture.patches) for picture in pictures),
        pictures_bucket=sum(t for t, _, _ in grids),
        frame=max(h * w for _, h, w in grids),
        windows=sum(t * -(-h // side) * -(-w // side) for t, h, w in grids),
    )
    inputs = qwen.Inputs(
        ids=row[None],
        positions=positions[:, None],
        segments=np.ones((1, length), np.int32),
        image_index=index[None],
        vision=planned,
    )
    patches = np.concatenate([picture.patches for picture in pictures])
    return Workload(name, row[None], patches, grids, delta, inputs)


def forward_flops(config: ModelConfig, work: Workload) -> float:
    """Floating point operations of one forward pass, 2 a multiply-add.

    Counted are matrix products: every weight for every token or patch, the logits of every token,
    and attention (within windows or frames; causal attention as if it were full). A backward pass
    takes twice as many; what is computed again to save memory does not count.
    """
    text, vision = config.text, config.vision
    tokens, patches = work.ids.shape[1], len(work.patches)
    width = text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    layer = text.hidden * (width + 3 * text.intermediate)
    products = tokens * (text.layers * layer + text.hidden * text.vocab_size)
    products += text.layers * 2 * tokens**2 * text.heads * text.head_dim
    block = vision.hidden * (4 * vision.hidden + 3 * vision.intermediate)
    products += patches * (vision.patch_dim * vision.hidden + vision.depth * block)
    merged = vision.hidden * vision.merge_size**2
    products += patches // vision.merge_size**2 * merged * (merged + vision.out_hidden)
    whole = len(vision.full_attention_layers)
    frames = sum(t * (h * w) ** 2 for t, h, w in work.grids)
    side = vision.window_tokens * vision.merge_size
    windows = sum(t * _squares(h, side) * _squares(w, side) for t, h, w in work.grids)
    pairs = whole * frames + (vision.depth - whole) * windows
    return 2.0 * (products + 2 * pairs * vision.hidden)


def _squares(length: int, side: int) -> int:
    """Sum of squares of the pieces when `length` is cut every `side`."""
    return length // side * side**2 + (length % side) ** 2


def decode_bytes(config: ModelConfig, rows: int, context: float) -> float:
    """Bytes that one decoding step cannot help reading: weights once, the cache of every row.

    Args:
        context: tokens in the cache of a row.
    """
    text = config.text
    heads = text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    biases = text.head_dim * (text.heads + 2 * text.kv_heads)
    layer = text.hidden * (heads + 3 * text.intermediate + 2) + biases
    weights = text.layers * layer + text.hidden * (text.vocab_size + 1)
    if not text.tied:
        weights += rows * text.hidden
    cache = rows * context * text.layers * 2 * text.kv_heads * text.head_dim
    kept, used = jnp.dtype(config.param_dtype).itemsize, jnp.dtype(config.dtype).itemsize
    return float(weights * kept + cache * used)


def parameters(shapes) -> int:
    """Numbers in a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
