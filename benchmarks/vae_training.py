"""A training step of an autoencoder (forward, backward, clipping, AdamW) against torch.

    python -m benchmarks.vae_training [--quick]

Stable Diffusion's size at 128x128, batch 1, the embedded pipeline's at 64x64, batch 8, and one with vector latents and
149,265 parameters at 64x64, batch 128. The loss is the squared error of the reconstruction from a sampled latent, and
the KL divergence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness.backends import mlx_work, torch_device, torch_work, training
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch, noise
from benchmarks.vae_speed import LAYOUTS, OURS, TORCH

KL_WEIGHT = 1e-6
RATE = 1e-5

SD: dict[str, Any] = {}
TINY: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
"""As in `mflux_vae_train.tiny_world.recipe`, which torch's process must not import."""

CASES = {"SD": (SD, 128, 1), "tiny": (TINY, 64, 8)}
"""Configuration, pixels, batch."""

VECTOR: dict[str, Any] = {
    "hidden_dims": (16, 32, 64),
    "latent_dim": 8,
    "image_size": 64,
    "upsampling": "repeat",
    "last_conv": False,
}
VECTOR_BATCH = 128
"""The preset `mlx-mnist`'s."""


def rows(options: Options) -> list[Row]:
    """The measurements."""
    return [
        Row(
            work=f"{name} autoencoder, training step {size}x{size}, batch {batch}",
            ours=Implementation(
                name="mflux-vae", build="benchmarks.vae_training:ours", settings={"case": name}, imports=IMPORTS
            ),
            peers=[
                Implementation(
                    name=f"torch, {layout}",
                    build="benchmarks.vae_training:diffusers",
                    settings={"case": name, "channels_last": last, "gpu": options.gpu},
                    imports=TORCH,
                )
                for layout, last in LAYOUTS.items()
                if last or not options.quick
            ],
            target=1.0,
        )
        for name, (_, size, batch) in CASES.items()
    ] + [
        Row(
            work=f"autoencoder with vector latents, training step 64x64, batch {VECTOR_BATCH}",
            ours=Implementation(name="mflux-vae", build="benchmarks.vae_training:our_vectors", imports=IMPORTS),
            peers=[
                Implementation(
                    name=f"torch, {layout}",
                    build="benchmarks.vae_training:torch_vectors",
                    settings={"channels_last": last, "gpu": options.gpu},
                    imports=TORCH[1:],
                )
                for layout, last in LAYOUTS.items()
                if last or not options.quick
            ],
            target=1.0,
        )
    ]


IMPORTS = (*OURS, "mflux_vae_train.vae.objective", "mflux_vae_train.optimizers")


def inputs(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (B, H, W, 3) in [-1, 1], and noise (B, H / 8, W / 8, latent)."""
    settings, size, batch = CASES[case]
    latent = (batch, size // 8, size // 8, settings.get("latent_channels", 4))
    return np.tanh(noise("pixels", (batch, size, size, 3))), noise("noise", latent)


def ours(case: str) -> Work:
    """This project's network and step."""
    from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

    network = AutoencoderKL(AutoencoderKLConfig(**CASES[case][0]))
    settings = {"beta": KL_WEIGHT, "reconstruction_loss_type": "mse", "reduction": "mean"}
    return _our_step(network, settings, *inputs(case))


def _our_step(network: Any, settings: dict[str, Any], images: np.ndarray, draws: np.ndarray) -> Work:
    """The step of `mflux-vae train`, latents drawn with given noise."""
    import mlx.core as mx

    from mflux_vae_train.optimizers.adam import AdamW
    from mflux_vae_train.training.step import MicroBatch, Step
    from mflux_vae_train.vae.config import VAETrainingSettings
    from mflux_vae_train.vae.objective import Objective

    class Given(Objective):
        def noise(self, arrays: Any, shape: Any) -> mx.array:
            given: mx.array = arrays["noise"]
            return given

    fill_mlx(network)
    network.train()
    objective = Given(VAETrainingSettings(**settings), network, dataset_size=len(images))
    step = Step(network, AdamW(weight_decay=1e-2), objective, buffers=True)
    arrays = {"pixels": mx.array(images), "noise": mx.array(draws), "beta": mx.array(settings["beta"])}
    batch = MicroBatch(arrays={**arrays, "key": mx.zeros((len(images), 2), mx.uint32)}, weight=len(images))

    def run() -> dict[str, float]:
        told = step(0, [batch], RATE)
        return {name: told[name] for name in ("loss", "grad_norm")}

    return mlx_work(training(run))


def vectors() -> tuple[Any, np.ndarray, np.ndarray]:
    """The configuration, pixels (B, 64, 64, 1) in [0, 1] and noise (B, latent)."""
    from mflux_vae.networks.vector_latent import FlatConfig

    config = FlatConfig(**VECTOR)
    side = config.image_size
    pixels = np.tanh(noise("pixels", (VECTOR_BATCH, side, side, 1))) * np.float32(0.5) + np.float32(0.5)
    return config, pixels, noise("noise", (VECTOR_BATCH, config.latent_dim))


def our_vectors() -> Work:
    """The network with vector latents."""
    from mflux_vae.networks.vector_latent import FlatAutoencoder

    config, images, draws = vectors()
    settings = {"beta": 1.0, "reconstruction_loss_type": "mse", "reduction": "sum"}
    return _our_step(FlatAutoencoder(config), settings, images * 2 - 1, draws)


def torch_vectors(channels_last: bool, gpu: bool) -> Work:
    """The same network and optimizer in torch."""
    import torch

    from benchmarks.peers.vector_vae import Vectors

    device, (config, images, draws) = torch_device(gpu), vectors()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = Vectors(config)
    fill_torch(network)
    network = network.train().to(device, memory_format=layout)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    latent_noise = torch.from_numpy(draws).to(device)
    update = _torch_update(network)

    def run() -> dict[str, Any]:
        made, mean, logvar = network(pixels, latent_noise)
        error = (made - pixels).square().sum((1, 2, 3)).mean()
        loss = error + 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return update(loss)

    return torch_work(training(run), device)


def diffusers(case: str, channels_last: bool, gpu: bool) -> Work:
    """diffusers' network and torch's optimizer."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    device = torch_device(gpu)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    settings = {"layers_per_block": 2, "block_out_channels": (128, 256, 512, 512), **CASES[case][0]}
    levels = len(settings["block_out_channels"])
    network = AutoencoderKL(
        **settings,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    fill_torch(network)
    network = network.train().to(device, memory_format=layout)
    pixels, draws = (
        torch.from_numpy(array).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
        for array in inputs(case)
    )
    update = _torch_update(network)

    def run() -> dict[str, Any]:
        posterior = network.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * draws
        error = (network.decode(latents).sample - pixels).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean()
        return update(loss)

    return torch_work(training(run), device)


def _torch_update(network: Any) -> Callable[[Any], dict[str, Any]]:
    """loss -> what is compared, after backward pass, clipping and AdamW."""
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)

    def update(loss: Any) -> dict[str, Any]:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss, "grad_norm": norm}

    return update


if __name__ == "__main__":
    sys.exit(main({"vae_training": rows}, __doc__))
