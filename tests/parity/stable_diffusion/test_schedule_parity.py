"""Noise schedule, training loss and sampling against diffusers' schedulers and DreamBooth scripts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.stable_diffusion.predict import error_weight, noised, velocity
from mflux_vae_train.pipelines.stable_diffusion.sample import sample
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule
from mflux_vae_train.randomness import Stream, sample_keys

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers, with numpy 2
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
NO_CLIP = {"clip_sample": False, "set_alpha_to_one": False}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("DDIMScheduler", NO_CLIP),
    "sd15 alpha": ("DDIMScheduler", {"clip_sample": False}),
    "sd21": ("DDIMScheduler", {**NO_CLIP, "prediction_type": "v_prediction"}),
    "linspace": ("DDIMScheduler", {**NO_CLIP, "timestep_spacing": "linspace"}),
    "ddim zero snr": ("DDIMScheduler", {**NO_CLIP, **ZERO_SNR}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler v": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "euler zero snr": ("EulerDiscreteScheduler", ZERO_SNR),
    "turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ancestral v": ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
}


def schedulers(name: str) -> tuple[Any, DiscreteSchedule]:
    kind, options = SAMPLERS[name]
    theirs = getattr(diffusers, kind)(**SD, **options)
    return theirs, DiscreteSchedule.from_dict({**theirs.config, "_class_name": kind})


@pytest.mark.parametrize("name", SAMPLERS)
def test_ten_steps_of_sampling_equal_those_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = schedulers(name)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    fresh = np.random.default_rng(1).standard_normal((10, *noise.shape)).astype(np.float32)
    monkeypatch.setattr(
        f"{sample.__module__}.normal", lambda key, shape, left=list(fresh): mx.array(left.pop(0)), raising=True
    )

    theirs.set_timesteps(10)
    left = list(fresh)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
        lambda *_, **__: torch.from_numpy(left.pop(0)),
    )
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        x = theirs.scale_model_input(latents, timestep)
        predicted = torch.tanh(x) * (0.5 + float(timestep) / 1000)
        latents = theirs.step(predicted, timestep, latents).prev_sample

    def network(x: mx.array, timestep: mx.array) -> mx.array:
        return mx.tanh(x) * (0.5 + timestep[:, None, None, None] / 1000)

    keys = sample_keys(0, Stream.PREVIEW, 0, range(2))
    drawn = sample(network, mx.array(noise), ours, steps=10, key=keys)
    np.testing.assert_allclose(drawn, latents.numpy(), atol=1e-4 * np.abs(latents.numpy()).max())


@pytest.mark.parametrize("options", [{}, ZERO_SNR, {"beta_schedule": "linear"}], ids=str)
def test_levels_of_training_equal_those_of_diffusers(options: dict[str, Any]) -> None:
    theirs = diffusers.DDPMScheduler(**{**{name: SD[name] for name in SD if name != "steps_offset"}, **options})
    ours = DiscreteSchedule.from_dict({**theirs.config, "_class_name": "DDIMScheduler", "clip_sample": False})
    np.testing.assert_allclose(ours.signals, theirs.alphas_cumprod.numpy(), rtol=2e-6, atol=1e-9)
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 5, 3, 3, 4)).astype(np.float32)
    timesteps = torch.tensor([0, 1, 250, 998, 999])
    signal = mx.array(ours.signals)[mx.array(timesteps.numpy())]
    given = torch.from_numpy(clean), torch.from_numpy(noise), timesteps
    for ours_of, theirs_of in ((noised, theirs.add_noise), (velocity, theirs.get_velocity)):
        expected = theirs_of(*given).numpy()
        np.testing.assert_allclose(ours_of(mx.array(clean), mx.array(noise), signal), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_those_of_diffusers_script(kind: str) -> None:
    from diffusers.training_utils import compute_snr

    theirs = diffusers.DDPMScheduler(**{name: SD[name] for name in SD if name != "steps_offset"})
    ours = DiscreteSchedule.from_dict({**theirs.config, "prediction_type": kind, "clip_sample": False})
    timesteps = torch.arange(1000)
    snr = compute_snr(theirs, timesteps)
    expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (
        snr if kind == "epsilon" else snr + 1
    )
    weights = error_weight(mx.array(ours.signals), ours, NoiseSampling(snr_gamma=5.0))
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-4)
