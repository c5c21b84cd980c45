"""Encode and decode of Stable Diffusion's autoencoder: against diffusers, against MLX as the wheel comes, and
against itself at 256 pixels, per pixel.

    python -m benchmarks.vae_speed [--quick] [--only "encode 256"]

FLUX.1's autoencoder has the same layers but for 16 latent channels and no 1x1 convolutions: its time is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.backends import compiled_if, mlx_work, nhwc, torch_device, torch_work
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch, noise

FACTOR, LATENT = 8, 4
TORCH = ("diffusers.models.autoencoders.autoencoder_kl", "torch")
OURS = ("mflux_vae.networks.autoencoder_kl",)
WHEEL = 64
"""Pixels; plain MLX takes seconds."""


def rows(options: Options) -> list[Row]:
    """The measurements."""
    against_torch, growth = ((256,), (128,)) if options.quick else ((256, 512), (512, 1024))
    measured = [
        Row(
            work=f"SD autoencoder, {what} {size}x{size}",
            ours=_ours(what, size),
            peers=[_torch(name, what, size, variant) for name, variant in options.torch_variants(images=True).items()],
            beside=_half_precision(what, size) if options.gpu else [],
            target=target,
            tolerance=1e-2 if options.gpu else 1e-3,
        )
        for size in against_torch
        for what, target in (("encode", 2.2), ("decode", 1.7))
    ]
    if not options.gpu:
        measured.append(
            Row(
                work=f"SD autoencoder, encode {WHEEL}x{WHEEL}, MLX as the wheel comes",
                ours=_ours("encode", WHEEL),
                peers=[
                    Implementation(
                        name="mlx.nn",
                        build="benchmarks.peers.plain_mlx:build",
                        settings={"what": "encode", "size": WHEEL},
                        imports=("mlx.nn",),
                        environment={"MFLUX_VAE_BLAS": "none"},
                        units=WHEEL * WHEEL,
                    )
                ],
                target=60,
                rounds=1 if options.quick else 2,
            )
        )
    measured += [
        Row(
            work=f"SD autoencoder, {what} {size}x{size} against itself at 256, per pixel",
            ours=_ours(what, size, name=f"at {size}"),
            peers=[_ours(what, 256, name="at 256")],
            target=1 / 1.3,
            tolerance=None,
            rounds=2,
        )
        for size in growth
        for what in ("encode", "decode")
    ]
    return measured


def inputs(what: str, size: int) -> np.ndarray:
    """Pixels (1, size, size, 3) in [-1, 1], or raw latents (1, size / 8, size / 8, 4)."""
    if what == "encode":
        return np.tanh(noise("pixels", (1, size, size, 3)))
    return noise("latents", (1, size // FACTOR, size // FACTOR, LATENT))


def ours(what: str, size: int, half: bool = False) -> Work:
    """This project's network."""
    import mlx.core as mx

    from mflux_vae.networks.autoencoder_kl import AutoencoderKL

    network = AutoencoderKL()
    fill_mlx(network)
    dtype = mx.bfloat16 if half else mx.float32
    network.set_dtype(dtype)
    given = mx.array(inputs(what, size)).astype(dtype)
    if what == "encode":
        return mlx_work(lambda: {"output": network.encode(given).mean})
    return mlx_work(lambda: {"output": network.decode(given)})


def diffusers(what: str, size: int, channels_last: bool, gpu: bool, compiled: bool = False, half: bool = False) -> Work:
    """diffusers' network."""
    import torch

    device = torch_device(gpu)
    dtype = torch.bfloat16 if half else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = _diffusers_model(torch).to(device, dtype, memory_format=layout)
    given = torch.from_numpy(inputs(what, size)).permute(0, 3, 1, 2)
    given = given.to(device, dtype).contiguous(memory_format=layout)

    def apply() -> Any:
        return network.encode(given).latent_dist.mean if what == "encode" else network.decode(given).sample

    apply = compiled_if(compiled, apply)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return {"output": nhwc(apply())}

    return torch_work(run, device)


def _diffusers_model(torch: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths = (128, 256, 512, 512)
    network = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=LATENT,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    fill_torch(network)
    return network.eval()


def _ours(what: str, size: int, *, name: str = "mflux-vae", half: bool = False) -> Implementation:
    return Implementation(
        name=name,
        build="benchmarks.vae_speed:ours",
        settings={"what": what, "size": size, "half": half},
        imports=OURS,
        units=size * size,
        compared=not half,
    )


def _torch(name: str, what: str, size: int, variant: Mapping[str, bool]) -> Implementation:
    half = variant.get("half", False)
    return Implementation(
        name=name,
        build="benchmarks.vae_speed:diffusers",
        settings={"what": what, "size": size, **variant},
        imports=TORCH,
        units=size * size,
        compared=not half,
        optional=variant.get("compiled", False),
    )


def _half_precision(what: str, size: int) -> Sequence[Implementation]:
    """bfloat16 for the record; MLX's CPU has no products in half precision."""
    variant = {"channels_last": True, "half": True, "gpu": True}
    return [
        _ours(what, size, name="mflux-vae, bfloat16", half=True),
        _torch("torch, bfloat16, channels last", what, size, variant),
    ]


if __name__ == "__main__":
    sys.exit(main({"vae_speed": rows}, __doc__))
