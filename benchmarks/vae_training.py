"""A training step of an autoencoder (forward, backward, clipping, AdamW) against torch.

    python -m benchmarks.vae_training [--quick]

Stable Diffusion's size at 128x128, batch 1, the embedded pipeline's at 64x64, batch 8, and three with vector latents.
The loss is the squared error of the reconstruction from a sampled latent, and the KL divergence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.harness.backends import compiled_if, mlx_work, torch_device, torch_update, torch_work, training
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch, noise
from benchmarks.vae_speed import OURS, TORCH

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


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """An autoencoder with vector latents: its configuration, and settings of the loss."""

    config: Mapping[str, Any]
    batch: int
    reduction: Literal["sum", "mean"] = "sum"
    beta: float = 1.0


VECTORS: Mapping[str, Vectors] = {
    "MNIST": Vectors(config={}, batch=128),
    "small": Vectors(
        config={"hidden_dims": (16, 32, 64), "latent_dim": 8, "image_size": 64}
        | {"upsampling": "repeat", "last_conv": False},
        batch=128,
    ),
    "VanillaVAE": Vectors(
        config={"hidden_dims": (64, 128, 256, 512, 1024), "latent_dim": 256, "image_size": 256}
        | {"in_channels": 3, "out_channels": 3, "output": "tanh"},
        batch=8,
        reduction="mean",
        beta=1e-4,
    ),
}
"""The presets `mnist`, `mlx-mnist` and `vanilla-256` of `mflux-vae train`, the last one with a smaller batch."""


def rows(options: Options) -> list[Row]:
    """The measurements."""
    images = {
        name: f"{name} autoencoder, training step {size}x{size}, batch {batch}"
        for name, (_, size, batch) in CASES.items()
    }
    vectors = {
        name: f"{name}, vector latents, training step {(size := case.config.get('image_size', 28))}x{size}, "
        f"batch {case.batch}"
        for name, case in VECTORS.items()
    }
    return [
        *(_row(options, work, name, "ours", "diffusers", TORCH) for name, work in images.items()),
        *(_row(options, work, name, "our_vectors", "torch_vectors", TORCH[1:]) for name, work in vectors.items()),
    ]


def _row(options: Options, work: str, case: str, ours: str, theirs: str, imports: Sequence[str]) -> Row:
    return Row(
        work=work,
        ours=Implementation(
            name="mflux-vae", build=f"benchmarks.vae_training:{ours}", settings={"case": case}, imports=IMPORTS
        ),
        peers=[
            Implementation(
                name=name,
                build=f"benchmarks.vae_training:{theirs}",
                settings={"case": case, **variant},
                imports=imports,
                optional=variant["compiled"],
            )
            for name, variant in options.torch_variants(images=True).items()
        ],
        target=1.6 if case == "SD" else 1.2,
    )


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
        measured = step(0, [batch], RATE)
        return {name: measured[name] for name in ("loss", "grad_norm")}

    return mlx_work(training(run))


def vectors(case: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """The configuration, pixels (B, H, W, C) in the range of its output, and noise (B, latent)."""
    from mflux_vae.networks.vector_latent import FlatConfig

    config, batch = FlatConfig(**VECTORS[case].config), VECTORS[case].batch
    side = config.image_size
    pixels = np.tanh(noise("pixels", (batch, side, side, config.in_channels)))
    if config.output == "sigmoid":
        pixels = pixels * np.float32(0.5) + np.float32(0.5)
    return config, pixels, noise("noise", (batch, config.latent_dim))


def our_vectors(case: str) -> Work:
    """The network with vector latents."""
    from mflux_vae.networks.vector_latent import FlatAutoencoder

    config, images, draws = vectors(case)
    settings = {"beta": VECTORS[case].beta, "reconstruction_loss_type": "mse", "reduction": VECTORS[case].reduction}
    return _our_step(FlatAutoencoder(config), settings, images * 2 - 1 if config.output == "sigmoid" else images, draws)


def torch_vectors(case: str, channels_last: bool, compiled: bool, gpu: bool) -> Work:
    """The same network and optimizer in torch."""
    import torch

    from benchmarks.peers.vector_vae import Vectors

    device, (config, images, draws) = torch_device(gpu), vectors(case)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = Vectors(config)
    fill_torch(network)
    network = network.train().to(device, memory_format=layout)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    latent_noise = torch.from_numpy(draws).to(device)
    reduce = torch.mean if VECTORS[case].reduction == "mean" else torch.sum

    def loss() -> Any:
        reconstruction, mean, logvar = network(pixels, latent_noise)
        error = reduce((reconstruction - pixels).square(), (1, 2, 3)).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return error + VECTORS[case].beta * kl

    loss, update = compiled_if(compiled, loss), torch_update([*network.parameters()], RATE)
    return torch_work(training(lambda: update(loss())), device)


def diffusers(case: str, channels_last: bool, compiled: bool, gpu: bool) -> Work:
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

    def loss() -> Any:
        posterior = network.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * draws
        error = (network.decode(latents).sample - pixels).square().mean()
        return error + KL_WEIGHT * posterior.kl().mean()

    loss, update = compiled_if(compiled, loss), torch_update([*network.parameters()], RATE)
    return torch_work(training(lambda: update(loss())), device)


if __name__ == "__main__":
    sys.exit(main({"vae_training": rows}, __doc__))
