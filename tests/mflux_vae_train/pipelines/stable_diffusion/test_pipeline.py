"""Stable Diffusion and SDXL as pipelines: sampling, conditioning on sizes, folders, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.capabilities import CropGeometry, SupportsSizeConditioning
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline, StableDiffusionXLPipeline
from mflux_vae_train.randomness import Stream, sample_keys
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import SCHEDULES, small_pipeline

PROMPTS = ["a photo of a red star", "a blue dog"]
KEYS = sample_keys(0, Stream.PREVIEW, 0, range(2))


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def pipeline(request, tmp_path: Path) -> StableDiffusionPipeline:
    return small_pipeline(tmp_path / "parts", request.param)


def sampled(pipeline: StableDiffusionPipeline, guidance: float = 2.0, **options) -> np.ndarray:
    conditioning = pipeline.encode_prompts(PROMPTS)
    return np.array(
        pipeline.sample(conditioning, **{"size": (32, 40), "steps": 2, "key": KEYS, **options}, guidance=guidance)
    )


def test_a_saved_folder_draws_the_same_images(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "saved", "float32")
    opened = open_pipeline(str(tmp_path / "saved"))
    assert type(opened) is type(pipeline) and opened.recommended == pipeline.recommended
    np.testing.assert_allclose(sampled(opened), sampled(pipeline), atol=1e-5)
    assert opened.encoder_fingerprint("prompts") == pipeline.encoder_fingerprint("prompts")


def test_guidance_changes_images(pipeline) -> None:
    images = [sampled(pipeline, guidance) for guidance in (0.0, 1.0, 4.0)]
    assert images[0].shape == (2, 32, 40, 3)
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[1] - images[2]).max() > 1e-2


def test_wrong_sizes_and_steps_raise(pipeline) -> None:
    for options in ({"size": (30, 32)}, {"size": (0, 32)}, {"steps": 0}):
        with pytest.raises(SettingsError, match=r"multiples|steps"):
            sampled(pipeline, **options)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_prediction_under_compile_equals_an_uncompiled_one(tmp_path, model) -> None:
    pipeline = small_pipeline(tmp_path, model)
    conditioning = dict(pipeline.encode_prompts(PROMPTS))
    latents = mx.random.normal((2, 4, 5, 4), key=mx.random.key(0))

    def loss(latents: mx.array, conditioning: dict[str, mx.array], key: mx.array) -> mx.array:
        sampling = NoiseSampling(snr_gamma=5.0, noise_offset=0.1)
        return pipeline.predict(latents, conditioning, key=key, guidance=1.0, sampling=sampling).loss()

    np.testing.assert_allclose(
        mx.compile(loss)(latents, conditioning, KEYS), loss(latents, conditioning, KEYS), rtol=1e-4
    )


def test_sizes_and_crops_condition_sdxl_alone(tmp_path) -> None:
    assert not isinstance(small_pipeline(tmp_path / "1", "sd1"), SupportsSizeConditioning)
    pipeline = small_pipeline(tmp_path / "xl", "sdxl")
    assert isinstance(pipeline, StableDiffusionXLPipeline) and isinstance(pipeline, SupportsSizeConditioning)
    crops = [
        CropGeometry(original=(3024, 4032), corner=(0, 170), target=(32, 40)),
        CropGeometry((32, 40), (0, 0), (32, 40)),
    ]
    encoded = pipeline.encode_crops(crops)["time_ids"]
    assert encoded.dtype == mx.float32 and encoded[0].tolist() == [3024, 4032, 0, 170, 32, 40]
    conditioning = dict(pipeline.encode_prompts(PROMPTS))
    latents, options = mx.zeros((2, 4, 5, 4)), {"key": KEYS, "guidance": 1.0}
    plain = pipeline.predict(latents, conditioning, **options).prediction
    cropped = pipeline.predict(latents, {**conditioning, "time_ids": encoded}, **options).prediction
    assert mx.abs(plain[0] - cropped[0]).max() > 1e-4
    np.testing.assert_allclose(plain[1], cropped[1], atol=1e-6)


def test_turbo_samples_in_one_step(tmp_path) -> None:
    schedule = replace(SCHEDULES["sdxl"], sampler="euler_ancestral", timestep_spacing="trailing")
    images = sampled(small_pipeline(tmp_path, "sdxl", schedule), guidance=0.0, steps=1)
    assert np.isfinite(images).all() and images.std() > 0.05


def test_options_of_rectified_flows_are_refused(pipeline) -> None:
    pipeline.check_sampling(NoiseSampling(scheme="debiased", snr_gamma=5.0, noise_offset=0.1))
    with pytest.raises(SettingsError, match="flux_shift"):
        pipeline.check_sampling(NoiseSampling(scheme="flux_shift"))


def test_prediction_type_of_a_folder_is_refused(tmp_path) -> None:
    small_pipeline(tmp_path / "parts", "sd1").save_pretrained(tmp_path / "saved")
    with pytest.raises(SettingsError, match="prediction_type"):
        open_pipeline(str(tmp_path / "saved"), prediction_type="epsilon")
