"""The training module of latent-diffusion: shapes, loss, methods in a custom loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.pretrained import loading
from mflux_vae_train.vae.compat.latent_diffusion import KL_WEIGHT, AutoEncoderKL

DDCONFIG: dict[str, Any] = {
    **{"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [8], "in_channels": 3},
    **{"resolution": 16, "z_channels": 6, "double_z": True},
}


def pixels(count: int = 2) -> mx.array:
    return mx.random.uniform(-1, 1, (count, 3, 16, 16), key=mx.random.key(0))


def small(**changes: Any) -> AutoEncoderKL:
    mx.random.seed(0)
    return AutoEncoderKL(DDCONFIG, embed_dim=4, **changes)


def test_shapes_and_loss() -> None:
    model = small()
    reconstruction, posterior = model(pixels())
    assert reconstruction.shape == (2, 3, 16, 16) and posterior.mean.shape == (2, 4, 8, 8)
    assert mx.array_equal(model(pixels(), sample_posterior=False)[0], model.decode(posterior.mode()))
    loss, metrics = model.default_loss(pixels(), reconstruction, posterior, split="val")
    error = mx.square(reconstruction - pixels()).mean()
    np.testing.assert_allclose(loss, error + KL_WEIGHT * posterior.kl().mean(), rtol=1e-6)
    assert metrics.keys() == {"val/total_loss", "val/rec_loss", "val/kl_loss"}


@pytest.mark.parametrize("lossconfig", [None, {"beta": 1e-6, "loss_type": "l1", "reduction": "mean"}, "custom"])
def test_custom_training_loop(lossconfig: Any) -> None:
    def custom(inputs: mx.array, outputs: mx.array, posterior: Any, step: int, **_: Any) -> Any:
        return mx.square(outputs - inputs).sum(), {"val/total_loss": mx.array(float(step))}

    model = small(lossconfig=custom if lossconfig == "custom" else lossconfig, monitor="val/total_loss")
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    step = nn.value_and_grad(model, lambda model, batch, index: model.training_step(batch, index))
    values = []
    for index in range(4):
        value, gradients = step(model, pixels(), index)
        optimizer.update(model, gradients)
        values.append(value.item())
    assert values[-1] < values[0]
    assert model.training_step(pixels(), 3).item() == model.training_step(pixels(), 3).item()
    metrics = [float(model.validation_step(pixels(), index)["val/total_loss"]) for index in range(2)]
    assert model.best == min(metrics)


def test_weights_come_from_a_checkpoint_but_for_what_is_ignored(tmp_path: Path) -> None:
    first = small()
    loading.save_network(first.network, tmp_path / "model.safetensors")
    mx.random.seed(1)
    outputs = AutoEncoderKL(DDCONFIG, 4, ckpt_path=tmp_path / "model.safetensors", ignore_keys=["decoder"])
    for (name, one), (_, other) in zip(
        tree_flatten(first.network.parameters()), tree_flatten(outputs.network.parameters()), strict=True
    ):
        if name.endswith("conv1.weight"):
            assert np.array_equal(one, other) != name.startswith("decoder"), name


def test_label_colours_and_invalid_configs() -> None:
    maps = mx.eye(5)[mx.zeros((2, 8, 8), mx.int32) + mx.arange(8) % 5].transpose(0, 3, 1, 2)
    shown = small(colorize_nlabels=5).to_rgb(maps)
    assert shown.shape == (2, 3, 8, 8) and shown.min() == -1 and shown.max() == 1
    assert not mx.array_equal(shown[..., 0], shown[..., 1]) and mx.array_equal(shown[..., 0], shown[..., 5])
    with pytest.raises(SettingsError, match="resolution"):
        AutoEncoderKL({k: v for k, v in DDCONFIG.items() if k != "resolution"}, 4)
