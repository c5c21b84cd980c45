"""Z-Image's pipeline against diffusers': a folder written here, opened there, from the same noise; and an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.lora.files import save_adapter  # noqa: E402
from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline  # noqa: E402
from tests.mflux_vae_train.pipelines.z_image.small_z_image import TEXT_TOKENS, small_pipeline  # noqa: E402
from tests.parity.references.drawing import STEPS, draw_ours, open_theirs  # noqa: E402

PROMPTS = ["a dog", "a photo of a red star and of a blue dog on a circle, and nothing else"]
LEVELS = 255


def draw_theirs(theirs, noise: np.ndarray, **arguments) -> np.ndarray:
    """Images in [0, 1], or latents, from NHWC noise."""
    _, height, width, _ = noise.shape
    return theirs(
        list(PROMPTS),
        height=height * 8,
        width=width * 8,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        max_sequence_length=TEXT_TOKENS,
        num_inference_steps=STEPS,
        **({"output_type": "np"} | arguments),
    ).images


@pytest.fixture(scope="module", params=[False, True], ids=["base", "turbo"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("z")
    small_pipeline(place / "parts", turbo=request.param).save_pretrained(place / "saved", "float32")
    return place / "saved"


def opened(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.prompt_limit = TEXT_TOKENS
    return pipeline


@pytest.mark.parametrize(("guidance", "size"), [(0.0, (4, 4)), (3.5, (6, 10))])
def test_images_and_latents_agree(folder: Path, guidance: float, size: tuple[int, int], monkeypatch) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.ZImagePipeline, folder)
    noise = np.random.default_rng(0).standard_normal((2, *size, 4)).astype(np.float32)
    expected = draw_theirs(theirs, noise, guidance_scale=guidance)
    assert expected.std() > 0.05, "nothing to see"
    assert np.abs(draw_ours(ours, PROMPTS, noise, guidance) - expected).max() * LEVELS <= 2
    latents = draw_theirs(theirs, noise, guidance_scale=guidance, output_type="latent").permute(0, 2, 3, 1).numpy()
    found = []
    monkeypatch.setattr("mflux_vae_train.pipelines.flow.pipeline.decode", lambda _, drawn: found.append(drawn) or drawn)
    draw_ours(ours, PROMPTS, noise, guidance)
    assert np.abs(np.array(found[0]) - latents).max() / np.abs(latents).max() <= 1e-4


@pytest.mark.parametrize("steps", [1, 8, 50])
def test_sigmas_agree_bit_for_bit(folder: Path, steps: int) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.ZImagePipeline, folder).scheduler
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.0)
    np.testing.assert_array_equal(ours.schedule.sigmas(steps, 64), theirs.sigmas.numpy())


def test_an_adapter_draws_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.ZImagePipeline, folder)
    noise = np.random.default_rng(1).standard_normal((2, 4, 6, 4)).astype(np.float32)
    before = draw_ours(ours, PROMPTS, noise, 2.0)
    lora.add_lora(ours.denoiser, ours.lora_targets(), rank=4, alpha=6.0)
    for number, layer in enumerate(lora.layers(ours.denoiser).values()):
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    save_adapter({"transformer": ours.denoiser}, tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_weights(tmp_path)
    after = draw_ours(ours, PROMPTS, noise, 2.0)
    assert np.abs(after - before).max() * LEVELS > 20, "the adapter changes nothing: nothing would be compared"
    assert np.abs(after - draw_theirs(theirs, noise, guidance_scale=2.0)).max() * LEVELS <= 2


def test_a_fused_adapter_of_kohya_draws_the_same_pictures(tmp_path: Path) -> None:
    ours = small_pipeline(tmp_path / "parts")
    ours.save_pretrained(tmp_path / "saved", "float32")
    theirs = open_theirs(diffusers.ZImagePipeline, tmp_path / "saved")
    noise = np.random.default_rng(1).standard_normal((2, 4, 6, 4)).astype(np.float32)
    lora.add_lora(ours.denoiser, ours.lora_targets(), rank=2)
    for number, layer in enumerate(lora.layers(ours.denoiser).values()):
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    tensors = lora.kohya_tensors(ours.denoiser, ours.kohya_naming().modules["transformer"])
    mx.save_safetensors(str(tmp_path / "kohya.safetensors"), tensors)
    theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    found, expected = draw_ours(ours, PROMPTS, noise, 0.0), draw_theirs(theirs, noise, guidance_scale=0.0)
    assert np.abs(found - expected).max() * LEVELS <= 2
