from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae_train import lora
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches
from mflux_vae_train.dreambooth.optimization.objective import (
    BASE_PREDICTION,
    add_base_prediction,
    combine,
    dreambooth_loss,
)
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction
from mflux_vae_train.training.step import Arrays, Step, global_norm
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset


def test_prior_loss_is_weighted_and_reported_unweighted():
    loss, parts = combine(mx.array([1.0, 3.0, 10.0, 20.0]), 0.5)
    assert loss.item() == 2 + 0.5 * 15
    assert {name: value.item() for name, value in parts.items()} == {"instance_loss": 2, "prior_loss": 15}


def test_without_prior_the_loss_is_the_mean():
    loss, parts = combine(mx.array([1.0, 3.0]), None)
    assert loss.item() == 2 and parts.keys() == {"instance_loss"}


def test_min_snr_weights_instance_samples_alone(monkeypatch):
    """As in diffusers' scripts; other weights are of all samples."""
    prediction = Prediction(mx.array([[1.0]] * 4), mx.zeros((4, 1)), mx.array([0.5] * 4), mx.zeros(4))
    monkeypatch.setattr(FakePipeline, "predict", lambda *_, **__: prediction)
    arrays = {"latents": mx.zeros((4, 1)), "conditioning": {}, "key": mx.zeros((4, 2), mx.uint32)}
    for sampling, expected in ((NoiseSampling(), 0.5 + 2 * 0.5), (NoiseSampling(snr_gamma=5.0), 0.5 + 2 * 1)):
        loss, _ = dreambooth_loss(FakePipeline(), arrays, guidance=1.0, prior_loss_weight=2.0, sampling=sampling)
        assert loss.item() == pytest.approx(expected)


def test_prior_of_weight_zero_has_no_gradient():
    gradient = mx.grad(lambda losses: combine(losses, 0.0)[0])(mx.array([1.0, 3.0, 10.0, 20.0]))
    assert gradient.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("weight", [None, 0.0, 1.0, 2.5])
def test_loss_combines_the_pipelines_losses_of_instance_and_class(weight):
    pipeline = FakePipeline()
    prompts = pipeline.encode_prompts(["a sks dog", "a dog", ""])
    latents = mx.random.normal((8, 4, 4, 3), key=mx.random.key(0))
    cache = small_dataset(latents[:5], None if weight is None else latents[5:], prompts)
    plan = Plan(samples=9, batch_size=3, accumulation=1)
    (batch,) = micro_batches(cache, plan, update=1, seed=0, caption_dropout=0.0)

    def pipeline_loss(which: int, part: slice) -> mx.array:
        rows = mx.array([which] * 3)
        conditioning = {name: array[rows] for name, array in prompts.items()}
        return pipeline.loss(batch.arrays["latents"][part], conditioning, key=batch.arrays["key"][part], guidance=1.0)

    expected = pipeline_loss(0, slice(0, 3)).mean()
    if weight is not None:
        expected = expected + weight * pipeline_loss(1, slice(3, 6)).mean()
    loss, _ = dreambooth_loss(pipeline, batch.arrays, guidance=1.0, prior_loss_weight=weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_gradients_reach_the_denoiser():
    pipeline = FakePipeline()
    prompts = pipeline.encode_prompts(["a sks dog", "a dog", ""])
    cache = small_dataset(mx.ones((2, 4, 4, 3)), mx.zeros((2, 4, 4, 3)), prompts)
    (batch,) = micro_batches(
        cache, Plan(samples=2, batch_size=2, accumulation=1), update=0, seed=0, caption_dropout=0.0
    )

    def loss(_: nn.Module) -> mx.array:
        return dreambooth_loss(pipeline, batch.arrays, guidance=1.0, prior_loss_weight=1.0)[0]

    _, gradients = nn.value_and_grad(pipeline.denoiser, loss)(pipeline.denoiser)
    assert all(float(mx.abs(gradient).max()) > 0 for _, gradient in tree_flatten(gradients))


def test_mask_weights_positions():
    target, prediction = (
        mx.zeros((2, 2, 2, 3)),
        mx.array([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1) * mx.ones((2, 1, 1, 3)),
    )
    predicted = Prediction(prediction, target, mx.array([1.0, 2.0]), mx.zeros(2))
    np.testing.assert_allclose(predicted.loss(), [7.5, 15])
    mask = mx.array([[[1.0, 0.5], [0, 0]], [[0, 0], [0, 0]]]).reshape(2, 2, 2, 1)
    # (1 * 1 + 0.5 * 4) / 1.5; a black mask gives a loss of zero
    np.testing.assert_allclose(predicted.loss(mask), [2, 0], rtol=1e-6)
    np.testing.assert_allclose(predicted.loss(mx.ones((2, 2, 2, 1))), predicted.loss())
    np.testing.assert_allclose(predicted.loss(mx.full((2, 2, 2, 1), 0.3)), predicted.loss(), rtol=1e-6)


@pytest.fixture
def adapted():
    """A pipeline with a LoRA that has an effect, and a micro-batch with output preservation."""
    pipeline = FakePipeline()
    lora.add_lora(pipeline.denoiser, pipeline.lora_targets(), rank=2)
    for layer in lora.layers(pipeline.denoiser).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    prompts = pipeline.encode_prompts(["a sks dog", "a dog", ""])
    cache = small_dataset(mx.random.normal((3, 4, 4, 3), key=mx.random.key(0)), None, prompts, preserves_output=True)
    (batch,) = micro_batches(
        cache, Plan(samples=3, batch_size=3, accumulation=1), update=0, seed=0, caption_dropout=0.0
    )
    return pipeline, batch


def test_class_output_is_compared_with_the_base_model(adapted):
    pipeline, batch = adapted
    completed = add_base_prediction(pipeline, pipeline.denoiser, batch, guidance=1.0)
    loss, parts = dreambooth_loss(pipeline, completed.arrays, guidance=1.0, prior_loss_weight=0.5)
    base = FakePipeline()
    arrays = tree_map(lambda array: array[3:], batch.arrays)
    given = (arrays["latents"], arrays["conditioning"])
    now, before = (one.predict(*given, key=arrays["key"], guidance=1.0).prediction for one in (pipeline, base))
    expected = mx.square(now - before).mean()
    assert expected > 1e-3
    np.testing.assert_allclose(parts["prior_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, parts["instance_loss"] + 0.5 * expected, rtol=1e-5)


def test_no_gradient_flows_through_the_base_prediction(adapted):
    pipeline, batch = adapted
    batch = add_base_prediction(pipeline, pipeline.denoiser, batch, guidance=1.0)
    arrays = batch.arrays
    options = {"key": arrays["key"], "guidance": 1.0}

    def loss(_: nn.Module, arrays: Arrays):
        return dreambooth_loss(pipeline, arrays, guidance=1.0, prior_loss_weight=0.5)

    def by_hand(parameters):
        pipeline.denoiser.update(parameters)
        predicted = pipeline.predict(arrays["latents"], arrays["conditioning"], **options)
        instance = mx.square(predicted.prediction - predicted.target)[:3].mean()
        return instance + 0.5 * mx.square(predicted.prediction[3:] - arrays[BASE_PREDICTION]).mean()

    expected = global_norm(mx.grad(by_hand)(parameters := pipeline.denoiser.trainable_parameters()))
    pipeline.denoiser.update(parameters)
    found = Step(pipeline.denoiser, optim.SGD(0.0), loss, compile=False)(0, [batch], 0.0)
    assert found["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_adapters_are_enabled_again_after_the_base_prediction(adapted):
    pipeline, batch = adapted
    arrays = batch.arrays
    given = (arrays["latents"], arrays["conditioning"])
    before = pipeline.loss(*given, key=arrays["key"], guidance=1.0)
    add_base_prediction(pipeline, pipeline.denoiser, batch, guidance=1.0)
    assert mx.array_equal(pipeline.loss(*given, key=arrays["key"], guidance=1.0), before)
