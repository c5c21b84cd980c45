"""A FLUX.1 transformer against diffusers: forward pass, and LoRA training step (with peft).

    python -m benchmarks.flux_speed

Two double and four single blocks at width 1024, 8 heads of 128; 256 image and 128 text tokens, batch 1; rank 16 on
every projection of attention and feed-forward.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.harness.backends import mlx_work, torch_device, torch_work, training
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch, noise, tensor

RANK, RATE = 16, 1e-4
SIDE, TEXT = 16, 128
"""Image tokens in each direction, and text tokens."""
CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
PATTERNS = ("*.attn.*to_*", "*.attn.*_proj", "*.ff*.net.*", "*.proj_mlp", "*.proj_out")
"""Of module paths: what `FluxPipeline.lora_targets` adapts."""


def rows(options: Options) -> list[Row]:
    """The measurement."""
    return [
        Row(
            work="FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward",
            ours=Implementation(
                name="mflux-vae",
                build="benchmarks.flux_speed:forward_ours",
                imports=("mflux_vae_train.pipelines.flux1.transformer",),
            ),
            peers=[
                Implementation(
                    name="torch",
                    build="benchmarks.flux_speed:forward_diffusers",
                    settings={"gpu": options.gpu},
                    imports=("diffusers.models.transformers.transformer_flux", "torch"),
                )
            ],
            target=1.0,
        ),
        Row(
            work="FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA training step",
            ours=Implementation(
                name="mflux-vae",
                build="benchmarks.flux_speed:ours",
                imports=(
                    "mflux_vae_train.pipelines.flux1.transformer",
                    "mflux_vae_train.lora",
                    "mflux_vae_train.training.step",
                    "mflux_vae_train.optimizers",
                ),
            ),
            peers=[
                Implementation(
                    name="torch",
                    build="benchmarks.flux_speed:diffusers",
                    settings={"gpu": options.gpu},
                    imports=("peft", "diffusers.models.transformers.transformer_flux", "torch"),
                )
            ],
            target=1.0,
        ),
    ]


def inputs() -> dict[str, np.ndarray]:
    """What the transformer takes, by its own argument names, and the `target` of its output."""
    positions = np.zeros((SIDE, SIDE, 3), np.float32)
    positions[..., 1], positions[..., 2] = np.arange(SIDE)[:, None], np.arange(SIDE)[None]
    return {
        "hidden_states": noise("latents", (1, SIDE * SIDE, 64)),
        "encoder_hidden_states": noise("text", (1, TEXT, CONFIG["joint_attention_dim"])),
        "pooled_projections": noise("pooled", (1, CONFIG["pooled_projection_dim"])),
        "timestep": np.array([0.6], np.float32),
        "img_ids": positions.reshape(-1, 3),
        "txt_ids": np.zeros((TEXT, 3), np.float32),
        "target": noise("target", (1, SIDE * SIDE, 64)),
    }


def ours() -> Work:
    """This project's transformer, adapters and step."""
    import mlx.core as mx
    import mlx.nn as nn

    from mflux_vae_train import lora
    from mflux_vae_train.optimizers.adam import AdamW
    from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
    from mflux_vae_train.training.step import Arrays, MicroBatch, Step

    network = FluxTransformer(FluxTransformerConfig(**CONFIG))
    fill_mlx(network)
    lora.add_lora(network, PATTERNS, rank=RANK)
    for path, layer in lora.layers(network).items():
        layer.lora_a = mx.array(_lora_a(path, layer.lora_a.shape[0]).T)
    given = {name: mx.array(array) for name, array in inputs().items()}

    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        target = arrays["target"]
        out = model(**{name: array for name, array in arrays.items() if name != "target"})
        return mx.square(out - target).mean(), {}

    step = Step(network, AdamW(weight_decay=1e-2), loss, compile=True)
    batch = MicroBatch(arrays=given, weight=1)

    def run() -> dict[str, float]:
        told = step(0, [batch], RATE)
        return {name: told[name] for name in ("loss", "grad_norm")}

    return mlx_work(training(run))


def diffusers(gpu: bool) -> Work:
    """diffusers' transformer, peft's adapters, torch's optimizer."""
    from fnmatch import fnmatchcase

    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from peft import LoraConfig

    device = torch_device(gpu)
    network = FluxTransformer2DModel(**CONFIG)
    fill_torch(network)
    network.requires_grad_(False)
    adapted = [
        path
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and any(fnmatchcase(path, pattern) for pattern in PATTERNS)
    ]
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=adapted))
    with torch.no_grad():
        for path in adapted:
            weight = network.get_submodule(path).lora_A["default"].weight
            weight.copy_(torch.from_numpy(_lora_a(path, weight.shape[1])))
    network = network.train().to(device)
    given = {name: torch.from_numpy(array).to(device) for name, array in inputs().items()}
    target = given.pop("target")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-2)

    def run() -> dict[str, Any]:
        loss = (network(**given, return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return {"loss": loss, "grad_norm": norm}

    return torch_work(training(run), device)


def forward_ours() -> Work:
    """This project's transformer, forward only."""
    import mlx.core as mx

    from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig

    network = FluxTransformer(FluxTransformerConfig(**CONFIG))
    fill_mlx(network)
    given = {name: mx.array(array) for name, array in inputs().items() if name != "target"}
    return mlx_work(lambda: {"velocity": network(**given)})


def forward_diffusers(gpu: bool) -> Work:
    """diffusers' transformer, forward only."""
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


def _lora_a(path: str, width: int) -> np.ndarray:
    return tensor(f"{path}.lora_A", (RANK, width))


if __name__ == "__main__":
    sys.exit(main({"flux_speed": rows}, __doc__))
