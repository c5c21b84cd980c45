"""What every DiffusionPipeline keeps. A pipeline's tests inherit `PipelineContract` and give it a fixture.

    class TestMine(PipelineContract):
        @pytest.fixture(scope="class")
        @classmethod
        def pipeline(cls):
            return MyPipeline.from_pretrained(...)

The fixture is shared: a test that changes the pipeline puts it back.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.pipelines.capabilities import (
    SupportsEncodingCache,
    SupportsPrediction,
    SupportsPromptInspection,
    SupportsTrimming,
)
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.pipelines.registry import missing_members
from mflux_vae_train.randomness import Stream, sample_keys

PROMPTS = ["a photo of a red circle", "", "a photo of sks dog on a beach, painted by somebody"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def keys(*samples: int) -> mx.array:
    return sample_keys(7, Stream.NOISE, 3, samples)


def pictures(pipeline: DiffusionPipeline, count: int) -> mx.array:
    side = pipeline.recommended.resolution
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.float32(0)), axis=-1)
    return mx.array(np.stack([np.roll(image, 3 * shift, axis=0) for shift in range(count)]))


def rows(arrays: dict[str, mx.array], *wanted: int) -> dict[str, mx.array]:
    return {name: array[mx.array(wanted)] for name, array in arrays.items()}


class PipelineContract:
    """Properties, not numbers: they hold for any size, architecture and objective."""

    @pytest.fixture(scope="class")
    @classmethod
    def latents(cls, pipeline: DiffusionPipeline) -> mx.array:
        return pipeline.encode_images(pictures(pipeline, 3))

    @pytest.fixture(scope="class")
    @classmethod
    def conditioning(cls, pipeline: DiffusionPipeline) -> dict[str, mx.array]:
        return dict(pipeline.encode_prompts(PROMPTS))

    @pytest.fixture(scope="class")
    @classmethod
    def guidance(cls, pipeline: DiffusionPipeline) -> float:
        return pipeline.recommended.guidance

    @pytest.fixture(scope="class")
    @classmethod
    def sample(cls, pipeline: DiffusionPipeline, guidance: float) -> Callable[..., mx.array]:
        def draw(conditioning: dict[str, mx.array], key: mx.array) -> mx.array:
            multiple = pipeline.recommended.size_multiple
            size = (2 * multiple, 3 * multiple)
            return pipeline.sample(conditioning, size=size, steps=2, guidance=guidance, key=key)

        return draw

    def test_has_every_member(self, pipeline):
        assert missing_members(pipeline) == []
        assert isinstance(pipeline, DiffusionPipeline)
        assert isinstance(pipeline.name, str) and pipeline.name
        assert isinstance(pipeline.denoiser, nn.Module)
        assert pipeline.adapter_prefix and "." not in pipeline.adapter_prefix

    def test_recommended_settings_are_valid(self, pipeline):
        recommended = pipeline.recommended
        assert recommended.resolution % recommended.size_multiple == 0
        assert 0 < recommended.learning_rate_full <= recommended.learning_rate
        assert recommended.steps >= 1 and recommended.rank >= 1 and recommended.guidance >= 0
        assert 0 <= recommended.caption_dropout < 1
        assert recommended.prior_loss_weight >= 0

    def test_latents_are_finite_and_independent(self, pipeline, latents):
        assert latents.shape[0] == 3 and latents.ndim >= 2
        assert bool(mx.isfinite(latents).all())
        alone = pipeline.encode_images(pictures(pipeline, 3)[1:2])
        np.testing.assert_allclose(alone[0], latents[1], **CLOSE)
        again = pipeline.encode_images(pictures(pipeline, 3))
        assert mx.array_equal(again, latents), "encode_images is not deterministic"

    def test_conditioning_rows_are_interchangeable(self, pipeline, conditioning):
        assert conditioning, "no arrays"
        for name, array in conditioning.items():
            assert array.shape[0] == len(PROMPTS), f"{name} is not batch first"
            assert bool(mx.isfinite(array.astype(mx.float32)).all()), name
        for index, prompt in enumerate(PROMPTS):
            for name, array in pipeline.encode_prompts([prompt]).items():
                assert array.shape[1:] == conditioning[name].shape[1:], f"{name} depends on the length of a prompt"
                np.testing.assert_allclose(array[0], conditioning[name][index], **CLOSE)

    def test_prompts_differ(self, conditioning):
        differences = [float(mx.abs(array[0] - array[1]).max()) for array in conditioning.values()]
        assert max(differences) > 1e-3, "a prompt is encoded like the empty one"

    def test_inspected_tokens_are_those_that_are_encoded(self, pipeline):
        """Prompts are cut where `inspect_prompts` tells: what follows changes nothing."""
        if not isinstance(pipeline, SupportsPromptInspection):
            return
        long = " ".join(f"word {index} of a prompt" for index in range(200))
        found = pipeline.inspect_prompts([long, "a red circle"])
        assert found and all(first.is_cut and not second.is_cut for first, second in found.values())
        read = long[: long.index(" ", max(first.end for first, _ in found.values()))]  # whole words
        prompts = [long, f"{read} and something else", "a red circle"]
        inspected = pipeline.inspect_prompts(prompts)
        assert all(one.ids == other.ids != another.ids for one, other, another in inspected.values())
        for name, array in pipeline.encode_prompts(prompts).items():
            np.testing.assert_allclose(array[0], array[1], **CLOSE, err_msg=name)
            assert float(mx.abs(array[0] - array[2]).max()) > 1e-3
        limited = pipeline.inspect_prompts([long], limit=6)
        assert any(each[0].limit == 6 == len(each[0].ids) for each in limited.values())

    def test_loss_is_one_finite_float_per_sample(self, pipeline, latents, conditioning, guidance):
        loss = pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance)
        assert loss.shape == (3,) and loss.dtype == mx.float32
        assert bool(mx.isfinite(loss).all()) and bool((loss >= 0).all())

    def test_loss_of_a_sample_depends_only_on_its_key(self, pipeline, latents, conditioning, guidance):
        together = pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance)
        for index in range(3):
            alone = pipeline.loss(
                latents[index : index + 1], rows(conditioning, index), key=keys(index), guidance=guidance
            )
            np.testing.assert_allclose(alone[0], together[index], **CLOSE)
        mixed = pipeline.loss(latents[mx.array([2, 0])], rows(conditioning, 2, 0), key=keys(2, 0), guidance=guidance)
        np.testing.assert_allclose(mixed, together[mx.array([2, 0])], **CLOSE)
        other = pipeline.loss(latents, conditioning, key=keys(5, 1, 2), guidance=guidance)
        assert float(mx.abs(other[0] - together[0])) > 1e-6, "the key is not used"

    def test_less_padding_changes_no_result(self, pipeline, latents, conditioning, guidance):
        if not isinstance(pipeline, SupportsTrimming):
            return
        trimmed = pipeline.trim(conditioning)
        assert sum(array.size for array in trimmed.values()) < sum(array.size for array in conditioning.values())
        expected, found = (
            pipeline.loss(latents, each, key=keys(0, 1, 2), guidance=guidance) for each in (conditioning, trimmed)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_loss_reaches_the_denoiser(self, pipeline, latents, conditioning, guidance):
        def mean_loss(denoiser: nn.Module) -> mx.array:
            return pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance).mean()

        _, gradients = nn.value_and_grad(pipeline.denoiser, mean_loss)(pipeline.denoiser)
        flat = tree_flatten(gradients)
        assert all(bool(mx.isfinite(gradient).all()) for _, gradient in flat)
        assert any(float(mx.abs(gradient).max()) > 0 for _, gradient in flat)

    def test_loss_uses_current_weights(self, pipeline, latents, conditioning, guidance):
        before = pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance)
        saved = pipeline.denoiser.parameters()
        try:
            changed = [(name, array + 0.05) for name, array in tree_flatten(saved)]
            pipeline.denoiser.load_weights(changed)
            after = pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance)
        finally:
            pipeline.denoiser.update(saved)
        assert float(mx.abs(after - before).max()) > 0

    def test_prediction_gives_the_loss(self, pipeline, latents, conditioning, guidance):
        if not isinstance(pipeline, SupportsPrediction):
            assert pipeline.recommended.weighting_scheme is None
            return
        asked = {"key": keys(0, 1, 2), "guidance": guidance}
        found = pipeline.predict(latents, conditioning, **asked)
        assert found.prediction.shape == found.target.shape == latents.shape
        assert found.weight.shape == found.sigma.shape == (3,)
        assert all(array.dtype == mx.float32 and bool(mx.isfinite(array).all()) for array in found)
        assert bool((found.sigma >= 0).all()) and bool((found.sigma <= 1).all()) and bool((found.weight >= 0).all())
        np.testing.assert_allclose(found.loss(), pipeline.loss(latents, conditioning, **asked), **CLOSE)

        named = NoiseSampling(scheme=pipeline.recommended.weighting_scheme)
        again = pipeline.predict(latents, rows(conditioning, 2, 0, 1), **asked, sampling=named)
        assert mx.array_equal(again.target, found.target), "the noise depends on more than the key"
        assert mx.array_equal(again.sigma, found.sigma), "the recommended scheme is not the default"

    def test_encoder_fingerprints_differ_by_use(self, pipeline):
        if not isinstance(pipeline, SupportsEncodingCache):
            return
        images, prompts = (pipeline.encoder_fingerprint(use) for use in ("images", "prompts"))
        assert images and prompts and images != prompts
        assert (images, prompts) == tuple(pipeline.encoder_fingerprint(use) for use in ("images", "prompts"))

    def test_samples_have_the_requested_size(self, pipeline, conditioning, sample):
        images = sample(conditioning, keys(0, 1, 2))
        multiple = pipeline.recommended.size_multiple
        assert images.shape == (3, 2 * multiple, 3 * multiple, 3)
        assert images.dtype == mx.float32
        assert bool(mx.isfinite(images).all())
        assert float(mx.abs(images).max()) < 20, "images are not in [-1, 1], even roughly"

    def test_sample_depends_only_on_its_key(self, conditioning, sample):
        together = sample(conditioning, keys(0, 1, 2))
        alone = sample(rows(conditioning, 1), keys(1))
        np.testing.assert_allclose(alone[0], together[1], rtol=1e-3, atol=1e-3)
        other = sample(rows(conditioning, 1), keys(9))
        assert float(mx.abs(other - alone).max()) > 1e-3, "the key is not used"

    def test_no_global_randomness(self, pipeline, latents, conditioning, guidance, sample):
        results = []
        for seed in (1, 2):
            mx.random.seed(seed)
            np.random.seed(seed)
            state = [np.array(array) for array in mx.random.state]
            loss = pipeline.loss(latents, conditioning, key=keys(0, 1, 2), guidance=guidance)
            results.append((np.array(loss), np.array(sample(conditioning, keys(0, 1, 2)))))
            assert all((np.array(now) == then).all() for now, then in zip(mx.random.state, state, strict=True))
        for first, second in zip(*results, strict=True):
            assert (first == second).all()

    def test_lora_targets_are_linear_layers(self, pipeline):
        patterns = list(pipeline.lora_targets())
        linear = [name for name, module in pipeline.denoiser.named_modules() if isinstance(module, nn.Linear)]
        assert patterns
        for pattern in patterns:
            assert any(fnmatch(name, pattern) for name in linear), f"{pattern} matches no linear layer"
