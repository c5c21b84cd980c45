"""Whole pipelines against diffusers': a folder written here, opened there, from the same noise; and with an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers, with numpy 2
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline  # noqa: E402

PROMPTS = ["a photo of a red star", "a blue dog on a circle"]
KEYS = mx.zeros((2, 2), mx.uint32)
STEPS, GUIDANCE, LEVELS = 5, 3.0, 255


def open_theirs(folder: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_theirs(theirs, noise: np.ndarray) -> np.ndarray:
    """Images in [0, 1] from NHWC noise."""
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    height, width = noise.shape[1] * 8, noise.shape[2] * 8
    options = {"height": height, "width": width, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return theirs(PROMPTS, latents=latents, output_type="np", **options).images


def draw_ours(ours: StableDiffusionPipeline, noise: np.ndarray) -> np.ndarray:
    size = noise.shape[1] * 8, noise.shape[2] * 8
    options = {"size": size, "steps": STEPS, "guidance": GUIDANCE, "key": KEYS, "latents": mx.array(noise)}
    return (np.array(ours.sample(ours.encode_prompts(PROMPTS), **options)) + 1) / 2


def noise_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, height, width, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_images_agree(tmp_path: Path, model: str, size: tuple[int, int]) -> None:
    small_pipeline(tmp_path / "parts", model).save_pretrained(tmp_path / "saved", "float32")
    ours, theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved"), open_theirs(tmp_path / "saved")
    expected = draw_theirs(theirs, noise_of(*size))
    assert expected.std() > 0.05, "nothing to see"
    assert np.abs(draw_ours(ours, noise_of(*size)) - expected).max() * LEVELS <= 2


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_an_adapter_of_unet_and_text_encoders_gives_the_same_images(tmp_path: Path, model: str) -> None:
    ours = small_pipeline(tmp_path / "parts", model)
    ours.save_pretrained(tmp_path / "saved", "float32")
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    before = draw_ours(ours, noise_of(4, 4))
    targets = {"unet": ours.lora_targets(), **ours.text_encoder_targets()}
    networks = {"unet": ours.denoiser, **ours.text_encoders_to_train()}
    for prefix, network in networks.items():
        lora.add_lora(network, targets[prefix], rank=3, alpha=6.0)
        for number, layer in enumerate(lora.layers(network).values()):
            layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    lora.save_adapter(networks, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = open_theirs(tmp_path / "saved")
    theirs.load_lora_weights(tmp_path)
    expected = draw_theirs(theirs, noise_of(4, 4))
    found = draw_ours(ours, noise_of(4, 4))
    assert np.abs(found - before).max() > 0.05, "the adapter hardly changes the image"
    assert np.abs(found - expected).max() * LEVELS <= 2
