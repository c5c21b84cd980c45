"""Write the answers of transformers for a small DINO and a small CLIP, for tests where transformers is absent.

    python -m tests.parity.evaluation.make_golden

Each folder holds a network as transformers saves it (half precision) and `golden.safetensors`: `image.N`, uint8
(H, W, 3); `pixels` after transformers' Pillow processor (N, S, S, 3); `image_features` of length 1, computed in
float32; CLIP's also `text_features` of `PROMPTS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer
from tests.mflux_vae_train.evaluation.small_networks import GOLDEN, PROMPTS, WORDS, noise_images
from tests.parity.make_golden import SIZE_LIMIT, randomise

SIZE = 32
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 2}
VISION = {**SMALL, "image_size": SIZE, "patch_size": 8}
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_pixels(images: list[np.ndarray], size: int) -> torch.Tensor:
    """(N, 3, size, size), as published for CLIP."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(images, return_tensors="pt").pixel_values


def dino_pixels(images: list[np.ndarray], short_side: int, size: int) -> torch.Tensor:
    """(N, 3, size, size), by DINO's evaluation transforms."""
    processor = ViTImageProcessorPil(
        size={"shortest_edge": short_side},
        crop_size={"height": size, "width": size},
        do_center_crop=True,
        resample=3,  # bicubic
        image_mean=DINO_MEAN,
        image_std=DINO_STD,
    )
    return processor(images, return_tensors="pt").pixel_values


def main() -> None:
    """Write the folders anew."""
    images = noise_images()
    write(
        GOLDEN / "dino",
        ViTModel(ViTConfig(**VISION), add_pooling_layer=False),
        dino_pixels(images, 36, SIZE),
        lambda model, pixels: {"image_features": model(pixels).last_hidden_state[:, 0]},
    )
    folder = GOLDEN / "clip"
    vocabulary = build_clip_tokenizer(WORDS, folder, 12)
    text = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 12, "eos_token_id": vocabulary - 1}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    ids = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    write(
        folder,
        CLIPModel(config),
        clip_pixels(images, SIZE),
        lambda model, pixels: {
            "image_features": model.get_image_features(pixels).pooler_output,
            "text_features": model.get_text_features(**ids).pooler_output,
        },
    )


@torch.no_grad()
def write(folder: Path, model: Any, pixels: torch.Tensor, answers: Any) -> None:
    """A network's folder anew."""
    randomise(model)
    model.half().save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    found = {name: torch.nn.functional.normalize(rows) for name, rows in answers(model, pixels).items()}
    found |= {f"image.{index}": torch.from_numpy(image) for index, image in enumerate(noise_images())}
    found["pixels"] = pixels.permute(0, 2, 3, 1)
    save_file({name: one.contiguous() for name, one in found.items()}, folder / "golden.safetensors")
    if (written := sum(file.stat().st_size for file in folder.iterdir())) > SIZE_LIMIT:
        raise SystemExit(f"{folder} has {written} bytes, more than {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
