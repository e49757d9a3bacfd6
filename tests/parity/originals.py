"""What the original says of the same conversations: its own processor, positions and decoding."""

import contextlib

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.types import Tokens


def patches(shown, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Patches [P, patch_dim] and grids [n, 3] of pictures, by the original's PIL processor."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    )
    out = processor(images=list(shown), return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"]


def batch(talks: list[tuple[Tokens, tuple]], config: ImageConfig, *, left: bool = False) -> dict:
    """Arguments of the original for (tokens, images) of each row, padded right or left.

    Token types must be given: without them positions silently become those of plain text.
    """
    length = max(len(tokens) for tokens, _ in talks)
    ids = torch.zeros((len(talks), length), dtype=torch.long)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(talks):
        n = len(tokens)
        at = slice(length - n, None) if left else slice(n)
        ids[row, at] = torch.from_numpy(tokens.ids).long()
        mask[row, at] = 1
        kinds[row, at] = torch.from_numpy(tokens.image_index >= 0).long()
    out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    if shown := [image for _, images in talks for image in images]:
        pixels, grids = patches(shown, config)
        out["pixel_values"] = torch.from_numpy(pixels)
        out["image_grid_thw"] = torch.from_numpy(np.asarray(grids)).long()
    return out


@contextlib.contextmanager
def first_layers(tower, name: str, count: int):
    """The tower with its first `count` layers only."""
    whole = getattr(tower, name)
    setattr(tower, name, whole[:count])
    try:
        yield
    finally:
        setattr(tower, name, whole)


def forget(model) -> None:
    """The original keeps the last call's deltas on the module."""
    model.model.rope_deltas = None


def positions(model, arguments: dict) -> tuple[np.ndarray, list[int]]:
    """Positions [3, B, T] and the delta of each row."""
    where, deltas = model.model.get_rope_index(
        arguments["input_ids"],
        mm_token_type_ids=arguments["mm_token_type_ids"],
        image_grid_thw=arguments.get("image_grid_thw"),
        attention_mask=arguments["attention_mask"],
    )
    return where.numpy(), deltas[:, 0].tolist()


def features(model, arguments: dict) -> np.ndarray:
    """Merged picture tokens [M, D] of the whole batch."""
    with torch.no_grad():
        out = model.model.visual(arguments["pixel_values"], arguments["image_grid_thw"])
    return out.pooler_output.numpy()


def hidden_layers(model, arguments: dict) -> list[np.ndarray]:
    """Per decoder layer its output after the final norm [B, T, D]: what the head would read."""
    forget(model)
    found = []
    norm = model.model.language_model.norm
    keep = lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hooks = [layer.register_forward_hook(keep) for layer in model.model.language_model.layers]
    with torch.no_grad():
        model(**arguments)
        found = [norm(hidden).numpy() for hidden in found]
    for hook in hooks:
        hook.remove()
    return found


def gradients(model, arguments: dict, loss) -> dict[str, torch.Tensor]:
    """The gradient of `loss(logits [B, T, V])` by the name of each parameter."""
    forget(model)
    model.zero_grad()
    loss(model(**arguments).logits).backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def greedy(model, arguments: dict, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` tokens [B, count] of each row, and the lead [B, count] of the best logit.

    Rows must be padded on the left. Nothing ends a row, nothing is penalised.
    """
    forget(model)
    start = arguments["input_ids"].shape[1]
    out = model.generate(
        **arguments,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    top = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
    return out.sequences[:, start:].numpy(), (top[..., 0] - top[..., 1]).numpy()
