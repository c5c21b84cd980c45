"""Twenty updates of the trainer, and the same in torch: network, weights at first, images, noise, loss, optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import torch.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from benchmarks.peers.vector_vae import Vectors  # noqa: E402
from mflux_vae.pretrained.families import FAMILIES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from mflux_vae_train.vae.build import build, latent_shape, parameter_count  # noqa: E402
from mflux_vae_train.vae.config import preset  # noqa: E402
from mflux_vae_train.vae.data.batches import open_data, split  # noqa: E402
from mflux_vae_train.vae.plan import Plan  # noqa: E402
from mflux_vae_train.vae.train import VAETrainer  # noqa: E402

UPDATES = 20
LIMIT = 1e-3
"""Largest relative difference of a loss."""
EQUAL = 16
"""Updates before the rounding of tiny gradients, which Adam magnifies, shows: MLX's operations, the extension and torch
each round in their order."""

IMAGES = {"digits_count": 330, "val_share": 1 / 33, "batch_size": 16, "num_epochs": 1, "samples_every": None}
SMALL_KL = {
    "image_size": 16,
    "hidden_dims": (16, 32),
    "layers_per_block": 1,
    "gradient_checkpointing": False,
    "in_channels": 3,
    "disc_start": None,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutional VAE of 149,265 parameters": ("mlx-mnist", {}),
    "transposed convolutions, beta rises": ("beta", {"beta_steps": 10, "learning_rate": 1e-4}),
    "tanh, rate falls": ("vanilla-256", {"image_size": 32, "hidden_dims": (8, 16, 32), "latent_dim": 16}),
    "AutoencoderKL": ("kl-f8", SMALL_KL),
}


class Spatial(nn.Module):
    """diffusers' network."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.network = diffusers.AutoencoderKL(**{k: v for k, v in config.items() if not k.startswith("_")})

    def forward(self, x: Any, noise: Any) -> tuple[Any, Any, Any]:
        posterior = self.network.encode(x).latent_dist
        return self.network.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


def theirs_of(settings: Any) -> nn.Module:
    """torch's network, with the weights that ours begins with."""
    ours = build(settings)
    spatial = settings.network == "kl"
    network = Spatial(ours.config.to_dict()) if spatial else Vectors(ours.config)
    tensors = from_mlx(
        dict(tree_flatten(ours.parameters())),
        FAMILIES[ours.config.to_dict()["_class_name"]].rules("diffusers", dict(tree_flatten(ours.parameters()))),
    )
    state = {("network." if spatial else "") + name: torch.from_numpy(np.array(t)) for name, t in tensors.items()}
    found = network.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all("num_batches_tracked" in key for key in found.missing_keys), found
    assert sum(p.numel() for p in network.parameters()) == parameter_count(ours)
    return network.train()


def losses_in_torch(settings: Any) -> list[float]:
    train, _ = split(
        open_data("digits", size=settings.image_size, channels=settings.in_channels, count=330)[0], 1 / 33, 0
    )
    plan = Plan(settings, train)
    network = theirs_of(settings)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = kind(network.parameters(), betas=betas, weight_decay=settings.weight_decay)
    shape, unit = (
        latent_shape(build(settings), settings.image_size),
        settings.output == "sigmoid" and settings.network == "flat",
    )
    error = {"mse": lambda a, b: (a - b).square(), "l1": lambda a, b: (a - b).abs()}[settings.reconstruction_loss_type]
    told = []
    for update in range(UPDATES):
        beta = settings.beta
        if settings.loss_type == "beta_vae":
            rise = min(1.0, update / settings.beta_steps)
            beta = settings.beta_start + rise * (settings.beta_end - settings.beta_start)
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = plan.learning_rate()(update)
        batches = plan.batches(update, beta=beta)
        total = 0.0
        for batch in batches:
            keys = batch.arrays["key"]
            noise = np.stack([np.array(mx.random.normal(shape, key=key)) for key in keys])
            pixels, noise = (
                torch.from_numpy(np.moveaxis(a, -1, 1).copy() if a.ndim == 4 else a)
                for a in (np.array(batch.arrays["pixels"]), noise)
            )
            target = pixels * 0.5 + 0.5 if unit else pixels
            made, mean, logvar = network(target, noise)
            each = error(made, target).flatten(1)
            rec = each.sum(1) if settings.reduction == "sum" else each.mean(1)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
            loss = (rec + beta * kl).mean() / len(batches)
            loss.backward()
            total += loss.item()
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        told.append(total)
    plan.close()
    return told


@pytest.mark.parametrize("name", CASES)
def test_twenty_updates_have_torchs_losses(tmp_path: Path, name: str) -> None:
    base, changes = CASES[name]
    settings = preset(base, **{**IMAGES, **changes, "output_dir": str(tmp_path)})
    outcome = VAETrainer(settings).train()
    assert outcome.updates == UPDATES
    ours = [json.loads(line)["loss"] for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    expected = losses_in_torch(settings)
    assert min(expected) < 0.95 * expected[0]  # something was learnt
    np.testing.assert_allclose(ours[:EQUAL], expected[:EQUAL], rtol=LIMIT)
    np.testing.assert_allclose(ours, expected, rtol=10 * LIMIT)
