"""FLUX's transformer by itself: configuration, fresh weights, gradients, independence of batch mates."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import WeightsError
from mflux_vae.kernels import rotate
from mflux_vae_train.pipelines.flux1.packing import image_ids, text_ids
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig, init_weights
from mflux_vae_train.pipelines.layers.embeddings import sinusoidal
from mflux_vae_train.pipelines.layers.rotary import rotation
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config


def inputs(config: FluxTransformerConfig, batch: int = 3) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(5), 4)
    given = {
        "hidden_states": mx.random.normal((batch, 6, config.in_channels), key=keys[0]),
        "encoder_hidden_states": mx.random.normal((batch, 5, config.joint_attention_dim), key=keys[1]),
        "pooled_projections": mx.random.normal((batch, config.pooled_projection_dim), key=keys[2]),
        "timestep": mx.random.uniform(shape=(batch,), key=keys[3]),
        "img_ids": image_ids(4, 6),
        "txt_ids": text_ids(5),
    }
    return given | ({"guidance": mx.linspace(1, 4, batch)} if config.guidance_embeds else {})


def parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def test_config_round_trip() -> None:
    config = small_config(guidance_embeds=True, out_channels=8)
    assert FluxTransformerConfig.from_dict(config.to_dict()) == config
    published = {
        "_class_name": "FluxTransformer2DModel",
        "_name_or_path": "x",
        "axes_dims_rope": [16, 56, 56],
    }
    assert FluxTransformerConfig.from_dict(published) == FluxTransformerConfig()


@pytest.mark.parametrize("axes", [(4, 6, 8), (5, 5, 6)])
def test_rope_axes_must_sum_to_the_head_width(axes: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="axes_dims_rope"):
        small_config(axes_dims_rope=axes)


def test_initial_weights_are_a_function_of_the_key() -> None:
    models = [FluxTransformer(small_config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        init_weights(model, mx.random.key(seed))
    first, same, other = (parameters(model) for model in models)
    assert all(mx.array_equal(first[name], same[name]) for name in first)
    assert not mx.array_equal(first["x_embedder.weight"], other["x_embedder.weight"])


def test_initial_model_predicts_zero_and_learns() -> None:
    model = FluxTransformer(small_config(guidance_embeds=True))
    init_weights(model, mx.random.key(1))
    given = inputs(model.config)
    assert float(mx.abs(model(**given)).max()) == 0
    _, gradients = nn.value_and_grad(model, lambda: mx.square(model(**given) - 1).mean())()
    assert float(mx.abs(gradients["proj_out"]["bias"]).max()) > 0
    model.proj_out.bias = mx.full(model.proj_out.bias.shape, 0.5)
    assert float(mx.abs(model(**given) - 0.5).max()) == 0


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_gradient_reaches_every_parameter(guidance_embeds: bool) -> None:
    model = drawn(FluxTransformer(small_config(guidance_embeds)), 3)
    given = inputs(model.config)
    _, gradients = nn.value_and_grad(model, lambda: mx.square(model(**given)).mean())()
    found = dict(tree_flatten(gradients))
    assert found.keys() == parameters(model).keys()
    assert not [name for name, gradient in found.items() if not float(mx.abs(gradient).max()) > 0]
    assert all(bool(mx.isfinite(gradient).all()) for gradient in found.values())


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_samples_of_a_batch_are_independent(guidance_embeds: bool) -> None:
    model = drawn(FluxTransformer(small_config(guidance_embeds)), 3)
    given = inputs(model.config)
    together = model(**given)
    shared = ("img_ids", "txt_ids")
    alone = model(**{name: value if name in shared else value[1:2] for name, value in given.items()})
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-5, atol=1e-5)


def test_guidance_is_required_only_if_embedded() -> None:
    for embeds in (False, True):
        model = FluxTransformer(small_config(embeds))
        given = inputs(model.config)
        given["guidance"] = None if embeds else mx.ones(3)
        with pytest.raises(ValueError, match="guidance"):
            model(**given)


def test_half_precision_is_close() -> None:
    """Weights and inputs in bfloat16; sinusoids and rotations are float32 inside."""
    model = drawn(FluxTransformer(small_config(guidance_embeds=True)), 3)
    given = inputs(model.config)
    exact = model(**given)
    model.set_dtype(mx.bfloat16)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    half = model(**given | {name: given[name].astype(mx.bfloat16) for name in names})
    assert half.dtype == mx.bfloat16
    assert float(mx.abs(half - exact).max() / mx.abs(exact).max()) < 0.05


def test_rope_preserves_norm_and_depends_on_distance() -> None:
    rope = rotation(mx.array([[0.0, row, 3.0] for row in range(8)]), (4, 6, 6))
    x, y = mx.random.normal((2, 1, 1, 1, 16), key=mx.random.key(0))
    q, k = (rotate(mx.broadcast_to(a, (1, 8, 1, 16)), rope)[0, :, 0] for a in (x, y))
    np.testing.assert_allclose(mx.linalg.norm(q, axis=-1), mx.broadcast_to(mx.linalg.norm(x), (8,)), rtol=1e-5)
    scores = np.array(q @ k.T)
    for distance in range(8):
        np.testing.assert_allclose(np.diag(scores, distance), scores[0, distance], rtol=1e-4, atol=1e-4)


def test_timestep_embedding_resolves_close_times() -> None:
    rows = sinusoidal(mx.array([0.0, 1000.0, 999.0], mx.bfloat16))
    assert rows.shape == (3, 256) and rows.dtype == mx.float32
    np.testing.assert_array_equal(rows[0], [1.0] * 128 + [0.0] * 128)
    assert float(mx.abs(sinusoidal(mx.array([501.0])) - sinusoidal(mx.array([500.5]))).max()) > 0.1
