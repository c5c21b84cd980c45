"""Properties of every `Autoencoder`: call `check_network` with a small one."""

from __future__ import annotations

import json
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.networks.protocol import Autoencoder


def check_network(network: Any, *, side: int) -> None:
    """Check shapes, scaling, configuration and gradients.

    Args:
        network: weights must be neither zero nor constant.
        side: side of the test images, pixels.
    """
    config = network.config
    pixels = mx.random.uniform(-1, 1, (2, side, side, config.in_channels), key=mx.random.key(0))
    shape = (2,) if config.vectors else (2, side // config.downsampling, side // config.downsampling)

    posterior = network.encode(pixels)
    assert posterior.mean.shape == posterior.logvar.shape == (*shape, config.latent_channels)
    assert posterior.mean.dtype == mx.float32
    decoded = network.decode(posterior.mean)
    assert decoded.shape[:3] == pixels.shape[:3] and decoded.dtype == mx.float32
    assert mx.isfinite(decoded).all()

    raw = posterior.mean
    scaled = network.to_scaled(raw)
    scaled_shape = (2,) if config.vectors else (2, *[side // config.scaled_downsampling] * 2)
    assert scaled.shape == (*scaled_shape, config.scaled_channels)
    assert mx.allclose(network.from_scaled(scaled), raw, atol=1e-4)

    values = json.loads(json.dumps(config.to_dict()))
    assert values["_class_name"]
    assert type(config).from_dict(values) == config
    assert config.scaling_factor and math.isfinite(config.shift_factor or 0.0)
    assert isinstance(config.force_upcast, bool)

    def loss(model: Autoencoder) -> mx.array:
        return mx.square(model.decode(model.encode(pixels).mean) - pixels).mean()

    value, gradients = nn.value_and_grad(network, loss)(network)
    assert mx.isfinite(value) and gradients["encoder"] and gradients["decoder"]
