"""The discrete schedule: published numbers, file format, what training draws, and the deterministic sampler."""

from __future__ import annotations

from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.noise import SCHEMES, NoiseSampling
from mflux_vae_train.pipelines.stable_diffusion.predict import predict, training_timesteps
from mflux_vae_train.pipelines.stable_diffusion.sample import sample
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule
from mflux_vae_train.randomness import Stream, sample_keys

FILE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD15 = DiscreteSchedule.from_dict(FILE)


def keys(count: int, start: int = 0) -> mx.array:
    return sample_keys(1, Stream.NOISE, 0, range(start, start + count))


def test_levels_of_stable_diffusion() -> None:
    signals = SD15.signals
    assert signals[0] == pytest.approx(0.99915, abs=1e-5) and signals[-1] == pytest.approx(0.0046601, abs=1e-7)
    sigma = np.sqrt((1 - signals) / signals)
    assert sigma[0] == pytest.approx(0.029167, abs=1e-5) and sigma[-1] == pytest.approx(14.6146, rel=1e-4)
    snr = signals / (1 - signals)
    assert snr[146] > 5 > snr[147] and snr[353] > 1 > snr[355]


def test_fifty_steps_of_stable_diffusion() -> None:
    timesteps = [level.timestep for level in SD15.levels(50)]
    assert timesteps[:3] == [981, 961, 941] and timesteps[-1] == 1
    assert SD15.levels(50)[-1].next_signal == SD15.signals[0]


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_file_round_trip(kind: str) -> None:
    schedule = DiscreteSchedule.from_dict({**FILE, "_class_name": kind, "timestep_spacing": "trailing"})
    assert DiscreteSchedule.from_dict(schedule.to_dict()) == schedule
    assert schedule.to_dict()["_class_name"] == kind


def test_unsupported_options_raise() -> None:
    for option in ({"prediction_type": "sample"}, {"trained_betas": [0.1]}, {"clip_sample": True}, {"beta_end": 2.0}):
        with pytest.raises(SettingsError, match="config"):
            DiscreteSchedule.from_dict({**FILE, **option})
    with pytest.raises(SettingsError, match="v_prediction"):
        DiscreteSchedule.from_dict({**FILE, "rescale_betas_zero_snr": True})


def test_replaced_sampler_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    schedule = DiscreteSchedule.from_dict({**FILE, "_class_name": "UniPCMultistepScheduler"})
    assert schedule.sampler == "ddim" and "UniPCMultistepScheduler" in caplog.text


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_raise(steps: int) -> None:
    with pytest.raises(SettingsError, match="steps"):
        SD15.levels(steps)


def test_timesteps_are_uniform_and_functions_of_each_key() -> None:
    drawn = np.array(training_timesteps(keys(4000), SD15, NoiseSampling()))
    assert drawn.min() >= 0 and drawn.max() <= 999 and abs(drawn.mean() - 499.5) < 15
    np.testing.assert_array_equal(training_timesteps(keys(10, start=5), SD15, NoiseSampling()), drawn[5:15])
    assert training_timesteps(keys(2), SD15, NoiseSampling(quantile=0.25)).tolist() == [750, 750]


def test_schemes_of_rectified_flow_raise() -> None:
    latents = mx.zeros((1, 2, 2, 4))
    for scheme in SCHEMES:
        sampling = NoiseSampling(scheme=scheme)
        if scheme in ("none", "uniform", "logit_normal", "mode", "debiased"):
            predict(lambda x, t: x, latents, key=keys(1), schedule=SD15, sampling=sampling)
        else:
            with pytest.raises(SettingsError, match=scheme):
                predict(lambda x, t: x, latents, key=keys(1), schedule=SD15, sampling=sampling)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_prediction_that_equals_the_target_draws_the_image(kind: str) -> None:
    """A network that knows the image gives it back, from any sampler's steps."""
    image = mx.random.normal((1, 4, 4, 4), key=mx.random.key(0))
    for sampler in ("ddim", "euler", "euler_ancestral"):
        schedule = DiscreteSchedule(
            **{**asdict(SD15), "sampler": sampler, "prediction_type": kind, "set_alpha_to_one": True}
        )

        def exact(x: mx.array, timestep: mx.array, schedule: DiscreteSchedule = schedule) -> mx.array:
            a = float(np.interp(timestep[0].item(), np.arange(1000), schedule.signals))
            noise = (x - a**0.5 * image) / (1 - a) ** 0.5
            return noise if kind == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * image

        drawn = sample(exact, mx.random.normal(image.shape), schedule, steps=25, key=keys(1))
        np.testing.assert_allclose(drawn, image, atol=0.05)


def test_noise_offset_is_constant_over_positions() -> None:
    def network(x: mx.array, timestep: mx.array) -> mx.array:
        return x

    options = {"key": keys(3), "schedule": SD15}
    plain = predict(network, mx.zeros((3, 8, 8, 4)), sampling=NoiseSampling(), **options)
    shifted = predict(network, mx.zeros((3, 8, 8, 4)), sampling=NoiseSampling(noise_offset=0.1), **options)
    offset = np.array(shifted.target - plain.target)
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-6)
    assert 0.02 < offset[:, 0, 0].std() < 0.3
