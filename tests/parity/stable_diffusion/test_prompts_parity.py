"""Encoded prompts against `encode_prompt` of diffusers' pipelines, with small random text encoders, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae_train.pipelines.stable_diffusion.prompts import TOKENIZERS, SDPrompts  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.small_text import LAYOUTS, small_prompts  # noqa: E402

PROMPTS = ["a photo of a red star!", "", "a blue dog on a circle and a star of a photo and a dog on a red circle"]
CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}


def open_theirs(prompts: SDPrompts, folder: Path, *, zeros: bool):
    """diffusers' pipeline with the same text encoders and nothing else."""
    parts = dict.fromkeys(("vae", "unet", "scheduler"))
    for name, encoder in prompts.encoders.items():
        (place := folder / name).mkdir()
        module = encoder.get()
        (place / "config.json").write_text(json.dumps(module.config.to_dict()))
        mx.save_safetensors(str(place / "model.safetensors"), dict(tree_flatten(module.parameters())), {"format": "pt"})
        parts[name] = CLASSES[name].from_pretrained(place).eval()
        tokenizer = TOKENIZERS[name]
        parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(folder / tokenizer)
    if "text_encoder_2" in parts:
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros)
    # diffusers' clip_skip reads `text_model.final_layer_norm`; transformers 5.6 and later have no `text_model`
    object.__setattr__(parts["text_encoder"], "text_model", parts["text_encoder"])
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **more)


def assert_close(ours: mx.array, theirs) -> None:
    reference = theirs.detach().numpy()
    assert ours.shape == reference.shape
    assert np.abs(np.array(ours) - reference).max() <= 1e-4 * max(np.abs(reference).max(), 1e-6)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@pytest.mark.parametrize("model", LAYOUTS)
def test_prompts_are_encoded_alike(tmp_path: Path, model: str, clip_skip: int | None, zeros: bool) -> None:
    ours = small_prompts(tmp_path, model, zeros_for_empty=zeros)
    ours.clip_skip = clip_skip
    theirs = open_theirs(ours, tmp_path, zeros=zeros)
    arguments = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": "cpu"}
    texts = [prompt for prompt in PROMPTS if prompt or not ours._zeros_for_empty]  # they encode "" as a prompt
    with torch.no_grad():
        embeds, negative, *pooled = theirs.encode_prompt(texts, **arguments, clip_skip=clip_skip)
    found = ours.encode(texts)
    assert_close(found["prompt_embeds"], embeds)
    if clip_skip is None or (zeros and model == "sdxl"):  # they skip no layer for the negative prompt
        both = ours.with_unconditional(found)
        assert_close(both["prompt_embeds"], torch.cat([negative, embeds]))
        if pooled:
            assert_close(both["pooled"], torch.cat(pooled[::-1]))
