"""FLUX.1's transformer as previews and class pictures use it, forward only, against diffusers.

    python -m benchmarks.flux_forward

Two double and four single blocks at width 1024, 8 heads of 128; 256 image and 128 text tokens, batch 1.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.flux_training import CONFIG, inputs
from benchmarks.harness import Options, Row, Side, Work, main
from benchmarks.implementations import mlx_work, torch_device, torch_work
from benchmarks.weights import fill_mlx, fill_torch


def rows(options: Options) -> list[Row]:
    """The measurement."""
    return [
        Row(
            work="FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward",
            ours=Side(
                name="mflux-vae",
                build="benchmarks.flux_forward:ours",
                imports=("mflux_vae_train.pipelines.flux1.transformer",),
            ),
            peers=[
                Side(
                    name="torch",
                    build="benchmarks.flux_forward:diffusers",
                    settings={"gpu": options.gpu},
                    imports=("diffusers.models.transformers.transformer_flux", "torch"),
                )
            ],
            target=1.0,
        )
    ]


def ours() -> Work:
    """This project's transformer."""
    import mlx.core as mx

    from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig

    network = FluxTransformer(FluxTransformerConfig(**CONFIG))
    fill_mlx(network)
    given = {name: mx.array(array) for name, array in inputs().items() if name != "target"}
    return mlx_work(lambda: {"velocity": network(**given)})


def diffusers(gpu: bool) -> Work:
    """diffusers' transformer."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    device = torch_device(gpu)
    network = FluxTransformer2DModel(**CONFIG)
    fill_torch(network)
    network = network.eval().to(device)
    given = {name: torch.from_numpy(array).to(device) for name, array in inputs().items() if name != "target"}

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return {"velocity": network(**given, return_dict=False)[0]}

    return torch_work(run, device)


if __name__ == "__main__":
    sys.exit(main({"flux_forward": rows}, __doc__))
