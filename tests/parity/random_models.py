"""Random models of the original implementation: every size drawn from a seed, no two alike."""

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmsr_jax.inputs.images import ImageConfig


def draw_config(seed: int, tokenizer) -> Qwen2_5_VLConfig:
    """Sizes of a small model. Odd seeds are tied; widths differ from one another, so that no
    transposed kernel goes unseen (queries and outputs stay square: the original wants that).
    """
    rng = np.random.default_rng([1, seed])

    def pick(*values):
        return values[rng.integers(len(values))]

    kv_heads, group = int(rng.integers(1, 4)), pick(1, 2, 3, 4, 7)
    half = pick(4, 6, 8, 10)
    hidden = kv_heads * group * 2 * half
    section = np.ones(3, int) + np.bincount(rng.integers(0, 3, half - 3), minlength=3)
    # A norm over fewer than 16 numbers magnifies rounding too much for the limits of these tests.
    vision_heads, vision_half = pick((1, 8), (1, 10), (2, 4), (2, 6), (3, 4), (4, 2), (4, 6))
    vision_hidden = vision_heads * 2 * vision_half
    widths = [w for w in range(33, 120) if w not in (hidden, vision_hidden)]
    intermediate, vision_intermediate = rng.choice(widths, 2, replace=False).tolist()
    depth = int(rng.integers(1, 6))
    full = sorted(rng.choice(depth, rng.integers(0, depth + 1), replace=False).tolist())
    patch = pick(2, 3, 4, 7)
    tied = bool(seed % 2)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.vocab_size + int(rng.integers(1, 40)),
            "hidden_size": hidden,
            "num_hidden_layers": int(rng.integers(1, 5)),
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "rms_norm_eps": pick(1e-6, 1e-5),
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": pick(1e4, 1e6),
                "mrope_section": section.tolist(),
            },
            "tie_word_embeddings": tied,
            "bos_token_id": tokenizer.pad_id,
            "eos_token_id": tokenizer.im_end,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": full,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "window_size": patch * 2 * int(rng.integers(1, 6)),
            "tokens_per_second": 2,
        },
        image_token_id=tokenizer.image_pad,
        video_token_id=tokenizer.special("<|video_pad|>"),
        vision_start_token_id=tokenizer.vision_start,
        vision_end_token_id=tokenizer.vision_end,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def image_config(config: Qwen2_5_VLConfig) -> ImageConfig:
    """Pictures of at most 20 merged tokens, cut as the tower wants them."""
    side = config.vision_config.patch_size * 2
    return ImageConfig(
        patch_size=config.vision_config.patch_size,
        min_pixels=side**2,
        max_pixels=20 * side**2,
    )


def build(seed: int, config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Random float32 weights: no bias zero, no norm one, logits spread over several units.

    Fresh weights would hide mistakes: their norms and biases do nothing, and a token mostly
    predicts itself.
    """
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                base = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(base + 0.2 * noise)
            else:
                # Attention that counts: else a model often repeats one token for ever.
                attends = name.endswith("o_proj.weight")
                parameter.copy_((1.4 if attends else 1.0) * noise / parameter[0].numel() ** 0.5)
        # The model must not say a placeholder: the original would want a picture for it later.
        for table in (model.lm_head.weight, model.model.language_model.embed_tokens.weight):
            table[[config.image_token_id, config.video_token_id]] *= 0.01
    # Nothing ends a row of `generate`. None in the arguments would mean "as the model says".
    model.generation_config.eos_token_id = None
    return model
