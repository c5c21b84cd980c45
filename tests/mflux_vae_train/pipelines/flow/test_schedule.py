"""FLUX's noise levels: ends, order, shift, and what training draws."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule, euler_step, noised
from mflux_vae_train.pipelines.noise import SCHEMES, NoiseSampling, error_weight
from mflux_vae_train.randomness import Stream, sample_keys

SCHEDULES = {
    "schnell": FlowMatchSchedule(),
    "static": FlowMatchSchedule(shift=3.0),
    "dev": FlowMatchSchedule(shift=3.0, use_dynamic_shifting=True),
}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request: pytest.FixtureRequest) -> FlowMatchSchedule:
    return request.param


def keys(count: int, start: int = 0) -> mx.array:
    return sample_keys(1, Stream.NOISE, 0, range(start, start + count))


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_sampling_levels_decrease_from_1_to_0(schedule: FlowMatchSchedule, steps: int) -> None:
    levels = schedule.sigmas(steps, 1024)
    assert levels.shape == (steps + 1,) and levels.dtype == np.float32
    assert levels[0] == 1 and levels[-1] == 0
    assert (np.diff(levels) < 0).all()


def test_unshifted_levels_are_evenly_spaced() -> None:
    np.testing.assert_allclose(SCHEDULES["schnell"].sigmas(4, 256), [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)


def test_dynamic_shift_grows_with_image_size() -> None:
    plain, dev = SCHEDULES["schnell"].sigmas(10, 1), SCHEDULES["dev"]
    small, large = dev.sigmas(10, 256), dev.sigmas(10, 4096)
    assert (plain[1:-1] < small[1:-1]).all() and (small[1:-1] < large[1:-1]).all()
    # at the two ends of the line mu is base_shift and max_shift: sigma 1/2 -> e^mu / (e^mu + 1)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        assert dev.shifted(np.float32(0.5), tokens) == pytest.approx(1 / (1 + np.exp(-mu)), rel=1e-6)


def test_zero_steps_raise(schedule: FlowMatchSchedule) -> None:
    with pytest.raises(SettingsError, match="at least 1 step"):
        schedule.sigmas(0, 256)


def test_config_round_trip(schedule: FlowMatchSchedule) -> None:
    assert FlowMatchSchedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    "change", [{"use_karras_sigmas": True}, {"shift_terminal": 0.02}, {"_class_name": "DDIMScheduler"}]
)
def test_unsupported_scheduler_configs_raise(change: dict) -> None:
    with pytest.raises(SettingsError, match="not supported"):
        FlowMatchSchedule.from_dict(FlowMatchSchedule().to_dict() | change)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_level_depends_only_on_its_key(schedule: FlowMatchSchedule, scheme: str) -> None:
    def draw(key: mx.array) -> np.ndarray:
        return np.array(schedule.training_sigmas(key, NoiseSampling(scheme=scheme), image_tokens=16))

    levels = draw(keys(500))
    assert levels.shape == (500,) and levels.dtype == np.float32
    assert (levels > 0).all() and (levels <= 1).all()
    np.testing.assert_allclose(draw(keys(3, start=200)), levels[200:203], rtol=1e-6)
    assert np.isfinite(np.array(error_weight(mx.array(levels), NoiseSampling(scheme=scheme)))).all()


def test_training_levels_follow_the_scheme() -> None:
    def draw(scheme: str, **numbers: float) -> np.ndarray:
        sampling = NoiseSampling(scheme=scheme, **numbers)
        return np.array(SCHEDULES["schnell"].training_sigmas(keys(2000), sampling, image_tokens=16))

    def logits(levels: np.ndarray) -> np.ndarray:
        return np.log(levels / (1 - levels))

    normal = logits(draw("logit_normal"))
    assert normal.mean() == pytest.approx(0, abs=0.1) and normal.std() == pytest.approx(1, abs=0.1)
    moved = logits(draw("logit_normal", logit_mean=1.0, logit_std=0.5))
    assert moved.mean() == pytest.approx(-1, abs=0.1) and moved.std() == pytest.approx(0.5, abs=0.1)
    # mu at 16 tokens of a line through (256, 0.5) and (4096, 1.15)
    shifted = logits(draw("flux_shift"))
    assert shifted.mean() == pytest.approx(0.459, abs=0.1) and shifted.std() == pytest.approx(1, abs=0.1)
    uniform = np.histogram(draw("uniform"), bins=4, range=(0, 1))[0]
    levels, counts = np.unique(draw("schnell"), return_counts=True)
    assert levels.tolist() == [0.25, 0.5, 0.75, 1.0]
    for count in (*uniform, *counts):
        assert count == pytest.approx(500, abs=100)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantile_is_that_of_random_levels(scheme: str) -> None:
    def draw(count: int, quantile: float | None = None) -> np.ndarray:
        sampling = NoiseSampling(scheme=scheme, quantile=quantile)
        return np.array(SCHEDULES["dev"].training_sigmas(keys(count), sampling, image_tokens=64))

    drawn = draw(2000)
    for quantile in (0.125, 0.5, 0.875):
        fixed = draw(2, 1 - quantile if scheme == "mode" else quantile)
        assert fixed[0] == fixed[1] and (drawn > fixed[0]).mean() <= quantile + 0.05
        assert (drawn >= fixed[0]).mean() >= quantile - 0.05


def test_training_shifts_by_size_only_with_flux_shift() -> None:
    dev, static, plain = SCHEDULES["dev"], SCHEDULES["static"], SCHEDULES["schnell"]

    def draw(schedule: FlowMatchSchedule, scheme: str) -> mx.array:
        return schedule.training_sigmas(keys(20), NoiseSampling(scheme=scheme), image_tokens=1024)

    assert mx.array_equal(draw(dev, "uniform"), draw(plain, "uniform"))
    assert bool((draw(static, "uniform") > draw(plain, "uniform")).all())
    assert mx.array_equal(draw(dev, "flux_shift"), draw(plain, "flux_shift"))


def test_unknown_scheme_raises() -> None:
    with pytest.raises(SettingsError, match="logit_normal"):
        NoiseSampling(scheme="cosine")


def test_euler_steps_with_true_velocity_reach_the_image(schedule: FlowMatchSchedule) -> None:
    image, noise = mx.random.normal((2, 3, 4, 5), key=mx.random.key(0))
    levels = schedule.sigmas(5, 256).tolist()
    x = noise
    for level, following in pairwise(levels):
        np.testing.assert_allclose(x, noised(image, noise, mx.full(3, level)), atol=1e-5)
        x = euler_step(x, noise - image, level, following)
    np.testing.assert_allclose(x, image, atol=1e-5)
