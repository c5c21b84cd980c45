"""FLUX.2 klein's pipeline against diffusers': the same folder, noise and adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("diffusers without FLUX.2 klein", allow_module_level=True)

import mlx.core as mx  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.lora.files import save_adapter  # noqa: E402
from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline  # noqa: E402
from mflux_vae_train.pipelines.flux2.schedule import Flux2Schedule  # noqa: E402
from tests.mflux_vae_train.pipelines.flux2.small_klein import TAPS, TEXT_TOKENS, SmallKlein, small_pipeline  # noqa: E402
from tests.parity.references.drawing import STEPS, draw_ours, open_theirs  # noqa: E402

PROMPTS = ["a dog", "a photo of a red star and of a blue dog on a circle, and nothing else"]
LEVELS = 255


def draw_theirs(theirs, noise: np.ndarray, **arguments) -> np.ndarray:
    """Images in [0, 1], or latents, from NHWC noise."""
    _, height, width, _ = noise.shape
    return theirs(
        prompt=list(PROMPTS),
        height=height * 16,
        width=width * 16,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        max_sequence_length=TEXT_TOKENS,
        text_encoder_out_layers=TAPS,
        num_inference_steps=STEPS,
        **({"output_type": "np"} | arguments),
    ).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("klein")
    small_pipeline(place / "parts").save_pretrained(place / "saved", "float32")
    return place / "saved"


def opened(folder: Path) -> Flux2KleinPipeline:
    pipeline = SmallKlein.from_pretrained(folder)
    pipeline.prompt_limit = TEXT_TOKENS
    return pipeline


@pytest.mark.parametrize(("guidance", "size"), [(1.0, (2, 2)), (4.0, (3, 5))])
def test_images_and_latents_agree(folder: Path, guidance: float, size: tuple[int, int], monkeypatch) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.Flux2KleinPipeline, folder)
    noise = np.random.default_rng(0).standard_normal((2, *size, 16)).astype(np.float32)
    expected = draw_theirs(theirs, noise, guidance_scale=guidance)
    assert expected.std() > 0.05, "nothing to see"
    assert np.abs(draw_ours(ours, PROMPTS, noise, guidance) - expected).max() * LEVELS <= 2
    latents = draw_theirs(theirs, noise, guidance_scale=guidance, output_type="latent").permute(0, 2, 3, 1).numpy()
    found = []
    monkeypatch.setattr("mflux_vae_train.pipelines.flow.pipeline.decode", lambda _, drawn: found.append(drawn) or drawn)
    draw_ours(ours, PROMPTS, noise, guidance)
    raw = ours.vae.network.from_scaled(found[0])
    assert np.abs(np.array(raw) - latents).max() / np.abs(latents).max() <= 1e-4


@pytest.mark.parametrize("steps", [1, 4, 50, 200])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4400])
def test_sigmas_agree_bit_for_bit(steps: int, tokens: int) -> None:
    ours = Flux2Schedule()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.to_dict())
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    np.testing.assert_array_equal(ours.sigmas(steps, tokens), theirs.sigmas.numpy())
    assert Flux2Schedule.from_dict(dict(theirs.config)) == ours


@pytest.mark.parametrize(("tokens", "steps", "mu"), [(1024, 4, 2.03069), (1024, 50, 1.70196), (4096, 4, 2.29118)])
def test_shift_of_sampling(tokens: int, steps: int, mu: float) -> None:
    assert Flux2Schedule().sampling_mu(tokens, steps) == pytest.approx(mu, abs=1e-5)


def test_an_adapter_draws_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.Flux2KleinPipeline, folder)
    noise = np.random.default_rng(1).standard_normal((2, 2, 3, 16)).astype(np.float32)
    before = draw_ours(ours, PROMPTS, noise, 2.0)
    lora.add_lora(ours.denoiser, ours.lora_targets(), rank=4, alpha=6.0)
    for number, layer in enumerate(lora.layers(ours.denoiser).values()):
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    save_adapter({"transformer": ours.denoiser}, tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_weights(tmp_path)
    after = draw_ours(ours, PROMPTS, noise, 2.0)
    assert np.abs(after - before).max() * LEVELS > 20, "the adapter changes nothing: nothing would be compared"
    assert np.abs(after - draw_theirs(theirs, noise, guidance_scale=2.0)).max() * LEVELS <= 2


def test_a_fused_adapter_of_kohya_draws_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    ours, theirs = opened(folder), open_theirs(diffusers.Flux2KleinPipeline, folder)
    noise = np.random.default_rng(1).standard_normal((2, 2, 3, 16)).astype(np.float32)
    lora.add_lora(ours.denoiser, ours.lora_targets(), rank=2)
    for number, layer in enumerate(lora.layers(ours.denoiser).values()):
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    tensors = lora.kohya_tensors(ours.denoiser, ours.kohya_naming().modules["transformer"])
    mx.save_safetensors(str(tmp_path / "kohya.safetensors"), tensors)
    theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    found, expected = draw_ours(ours, PROMPTS, noise, 1.0), draw_theirs(theirs, noise, guidance_scale=1.0)
    assert np.abs(found - expected).max() * LEVELS <= 2
