"""Random CLIP and SigLIP models of the original implementation, in folders as it writes them."""

import dataclasses

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# Widths differ from one another, so that no transposed kernel goes unseen.
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 40,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class Original:
    """A model and its processor."""

    model: torch.nn.Module
    processor: object

    def pixels(self, images) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def embed(self, images) -> np.ndarray:
        """Vectors [len(images), size] float32 of length 1."""
        pixels = self.pixels(images)
        with torch.no_grad():
            if hasattr(self.model, "get_image_features"):
                vectors = self.model.get_image_features(pixels).pooler_output
            else:
                out = self.model(pixels)
                vectors = out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output
        return torch.nn.functional.normalize(vectors, dim=1).numpy()

    def save(self, folder, **options) -> None:
        self.model.save_pretrained(folder, **options)
        self.processor.save_pretrained(folder)


def original(name: str, seed: int = 0, **vision) -> Original:
    """A model of the class `name` with random weights: no bias zero, no norm one."""
    sizes = VISION | vision
    clip = name.startswith("CLIP")
    if name.endswith("VisionModel") or name.endswith("WithProjection"):
        kind = transformers.CLIPVisionConfig if clip else transformers.SiglipVisionConfig
        config = kind(**sizes, **({"projection_dim": 24} if clip else {}))
    elif clip:
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=sizes, projection_dim=24)
    else:
        config = transformers.SiglipConfig(text_config=TEXT, vision_config=sizes)
    model = getattr(transformers, name)(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() > 1
            scale = parameter[0].numel() ** -0.5 if wide else 0.3
            noise = scale * torch.randn(parameter.shape, generator=draw)
            # Norms are the only vectors that start from one.
            parameter.copy_(noise + (1.0 if not wide and bool((parameter == 1).all()) else 0.0))
    side = sizes["image_size"]
    if clip:
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side + 5}, crop_size={"height": side, "width": side}
        )
    else:
        processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    return Original(model, processor)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures of many shapes, wide and tall."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(
            tuple(int(side) for side in rng.integers(20, 160, 2))
        )
        for _ in range(count)
    ]
