from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.dreambooth.data import Plan, micro_batches
from mflux_vae_train.dreambooth.objective import combine, dreambooth_loss
from tests.contracts.fake import FakePipeline
from tests.dreambooth.caches import plain_cache


def test_the_prior_is_weighted_and_reported_unweighted():
    loss, parts = combine(mx.array([1.0, 3.0, 10.0, 20.0]), 0.5)
    assert loss.item() == 2 + 0.5 * 15
    assert {name: value.item() for name, value in parts.items()} == {"instance_loss": 2, "prior_loss": 15}


def test_without_prior_it_is_the_mean():
    loss, parts = combine(mx.array([1.0, 3.0]), None)
    assert loss.item() == 2 and parts.keys() == {"instance_loss"}


def test_without_weight_the_prior_has_no_gradient():
    gradient = mx.grad(lambda losses: combine(losses, 0.0)[0])(mx.array([1.0, 3.0, 10.0, 20.0]))
    assert gradient.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("weight", [None, 0.0, 1.0, 2.5])
def test_it_is_the_pipelines_loss_of_instance_and_class(weight):
    pipeline = FakePipeline()
    prompts = pipeline.encode_prompts(["a sks dog", "a dog", ""])
    latents = mx.random.normal((8, 4, 4, 3), key=mx.random.key(0))
    cache = plain_cache(latents[:5], None if weight is None else latents[5:], prompts)
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
    cache = plain_cache(mx.ones((2, 4, 4, 3)), mx.zeros((2, 4, 4, 3)), prompts)
    (batch,) = micro_batches(
        cache, Plan(samples=2, batch_size=2, accumulation=1), update=0, seed=0, caption_dropout=0.0
    )

    def loss(_: nn.Module) -> mx.array:
        return dreambooth_loss(pipeline, batch.arrays, guidance=1.0, prior_loss_weight=1.0)[0]

    _, gradients = nn.value_and_grad(pipeline.denoiser, loss)(pipeline.denoiser)
    assert all(float(mx.abs(gradient).max()) > 0 for _, gradient in tree_flatten(gradients))
