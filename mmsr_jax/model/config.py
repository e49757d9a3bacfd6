"""Sizes of the model, and the published ones by name. Read real values from config.json."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

ATTENTION = ("auto", "xla", "cudnn", "triton", "splash")  # what they do: attention/choose.py
CACHED_ATTENTION = ("auto", "xla", "ragged", "paged")  # and these: attention/cached.py


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Patches are `patch_size` pixels wide, windows `window_size` pixels."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out_hidden: int
    full_attention_layers: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    merge_size: int = 2
    window_size: int = 112
    rope_theta: float = 1e4
    norm_eps: float = 1e-6  # fixed in the original code, whatever the text model's is

    def __post_init__(self):
        if self.hidden % self.heads or (self.hidden // self.heads) % 4:
            raise ValueError(
                f"vision hidden {self.hidden} over {self.heads} heads must give heads of a "
                "multiple of 4 (two rotary axes, two halves)"
            )
        if self.window_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"window_size {self.window_size} is not a multiple of "
                f"{self.patch_size * self.merge_size} (patch_size * merge_size)"
            )
        if any(not 0 <= layer < self.depth for layer in self.full_attention_layers):
            raise ValueError(
                f"full_attention_layers {self.full_attention_layers} beyond depth {self.depth}"
            )

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def window_tokens(self) -> int:
        """Side of a window in merged tokens."""
        return self.window_size // self.patch_size // self.merge_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model. `mrope_section` splits the head_dim/2 frequencies over (t, h, w)."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide by {self.kv_heads} kv_heads")
        if len(self.mrope_section) != 3:
            raise ValueError(f"mrope_section {self.mrope_section} is not of three axes")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, "
                f"half of head_dim {self.head_dim} is needed"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both towers and how to compute. Parameters are kept in `param_dtype`, used in `dtype`."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = True  # recompute a layer's inside in the backward pass (on CPU faster, too)
    attention: str = "auto"  # one of ATTENTION; any but auto is taken or refused, never replaced
    cached_attention: str = "auto"  # one of CACHED_ATTENTION: likewise, for decoding and extending
    # What the model may never say; of the tokenizer, filled in where model and tokenizer meet.
    unsampled_ids: tuple[int, ...] = ()
    sampled_vocab: int = 0  # ids from here on stand for no token; 0: all of text.vocab_size do

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(ATTENTION)}")
        if self.cached_attention not in CACHED_ATTENTION:
            raise ValueError(
                f"cached_attention {self.cached_attention!r} is none of "
                f"{', '.join(CACHED_ATTENTION)}"
            )
        if self.vision.out_hidden != self.text.hidden:
            raise ValueError(
                f"vision out_hidden {self.vision.out_hidden} is not text hidden {self.text.hidden}"
            )
        jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        size = self.text.vocab_size
        if not 0 <= self.sampled_vocab <= size:
            raise ValueError(f"sampled_vocab {self.sampled_vocab} is not within 0 and {size}")
        if wrong := [i for i in self.unsampled_ids if not 0 <= i < size]:
            raise ValueError(f"unsampled_ids {wrong} are no ids of a vocabulary of {size}")
        if self.eos_token_id in np.flatnonzero(self.unsampled):
            raise ValueError(f"eos_token_id {self.eos_token_id} is unsampled: no turn could end")

    @property
    def unsampled(self) -> np.ndarray:
        """[V] bool, read-only: ids that are never sampled and have no share in log-probs."""
        return _unsampled(self.text.vocab_size, self.unsampled_ids, self.sampled_vocab)


@functools.lru_cache(maxsize=16)
def _unsampled(size: int, ids: tuple[int, ...], known: int) -> np.ndarray:
    out = np.zeros(size, bool)
    out[list(ids)] = True
    out[known or size :] = True
    out.setflags(write=False)
    return out


def _published(
    vocab: int, hidden: int, layers: int, heads: int, kv: int, mlp: int, vision_mlp: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(
            vocab_size=vocab,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv,
            head_dim=128,
            intermediate=mlp,
            mrope_section=(16, 24, 24),
            tied=tied,
        ),
        vision=VisionConfig(
            depth=32,
            hidden=1280,
            heads=16,
            intermediate=vision_mlp,
            out_hidden=hidden,
            full_attention_layers=(7, 15, 23, 31),
        ),
        dtype="bfloat16",
    )


PRESETS: dict[str, ModelConfig] = {
    # About a million parameters: learns a small world on a laptop.
    "tiny": ModelConfig(
        text=TextConfig(
            vocab_size=512,
            hidden=128,
            layers=4,
            heads=4,
            kv_heads=2,
            head_dim=32,
            intermediate=384,
            mrope_section=(4, 6, 6),
            tied=True,
        ),
        vision=VisionConfig(
            depth=3,
            hidden=64,
            heads=4,
            intermediate=128,
            out_hidden=128,
            full_attention_layers=(2,),
        ),
        image_token_id=12,
        video_token_id=13,
        vision_start_token_id=9,
        vision_end_token_id=10,
        bos_token_id=0,
        eos_token_id=2,
    ),
    "3b": _published(151936, 2048, 36, 16, 2, 11008, 3420, True),
    "7b": _published(152064, 3584, 28, 28, 4, 18944, 3420, False),
    "32b": _published(152064, 5120, 64, 40, 8, 27648, 3456, False),
    "72b": _published(152064, 8192, 80, 64, 8, 29568, 3456, False),
}


def preset(name: str) -> ModelConfig:
    """The config of that name; change sizes with `dataclasses.replace`.

    Raises:
        ValueError: no such name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
