"""Transformers of FLUX.1, FLUX.2 and Z-Image, and Stable Diffusion's UNet, against diffusers: forward pass, and LoRA
training step (with peft).

    python -m benchmarks.denoisers [--only "FLUX.2"]

Random weights in a few blocks of width 640 to 1024, batch 1, and the networks of the embedded pipelines at their batch
in training. LoRA of rank 16: every projection of attention, in FLUX.1 of feed-forward layers, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.harness.backends import compiled_if, mlx_work, nhwc, torch_device, torch_update, torch_work, training
from benchmarks.harness.cli import Options, main
from benchmarks.harness.process import ROOT
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch, noise, tensor

RANK, RATE = 16, 1e-4
ATTENTION = ("*.att*.*to_*", "*.attn.*_proj")
FEED_FORWARD = ("*.ff*.net.*", "*.proj_mlp", "*.proj_out")
PIPELINES = "mflux_vae_train.pipelines"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A denoiser.

    Attributes:
        ours, theirs: "module:class"; ours has its configuration as class + "Config".
        config: of both, in diffusers' format.
        inputs: arguments of our network by name, float32; images are NHWC.
        call: (diffusers' network, inputs as tensors) -> its output in the shape of ours.
        adapted: patterns of paths of layers.
        images: whether torch's memory layout matters.
    """

    ours: str
    theirs: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, np.ndarray]]
    call: Callable[[Any, Mapping[str, Any]], Any]
    adapted: Sequence[str] = ATTENTION
    images: bool = False


def _flux_inputs(config: Mapping[str, Any], side: int, text: int, batch: int) -> dict[str, np.ndarray]:
    """side x side image tokens and `text` tokens; three axes of positions in FLUX.1, four in FLUX.2."""
    axes = len(config["axes_dims_rope"])
    image_ids, text_ids = np.zeros((side, side, axes), np.float32), np.zeros((text, axes), np.float32)
    image_ids[..., 1], image_ids[..., 2] = np.arange(side)[:, None], np.arange(side)[None]
    if axes == 4:
        text_ids[:, 3] = np.arange(text)
    given = {
        "hidden_states": noise("latents", (batch, side * side, config["in_channels"])),
        "encoder_hidden_states": noise("text", (batch, text, config["joint_attention_dim"])),
        "timestep": np.linspace(0.6, 0.2, batch, dtype=np.float32),
        "img_ids": image_ids.reshape(-1, axes),
        "txt_ids": text_ids,
    }
    if "pooled_projection_dim" in config:
        given["pooled_projections"] = noise("pooled", (batch, config["pooled_projection_dim"]))
    return given


def _call_flux(network: Any, given: Mapping[str, Any]) -> Any:
    return network(**given, return_dict=False)[0]


def _call_unet(network: Any, given: Mapping[str, Any]) -> Any:
    latents = given["latents"].permute(0, 3, 1, 2)
    return nhwc(network(latents, given["timesteps"], given["text"], return_dict=False)[0])


def _call_z_image(network: Any, given: Mapping[str, Any]) -> Any:
    images = [image.permute(2, 0, 1)[:, None] for image in given["latents"]]
    outputs = network(images, given["timestep"], list(given["caption"]), return_dict=False)[0]
    return nhwc(outputs[0][:, 0][None])


def _flux(config: Mapping[str, Any], side: int, text: int, batch: int = 1) -> Case:
    return Case(
        ours=f"{PIPELINES}.flux1.transformer:FluxTransformer",
        theirs="diffusers.models.transformers.transformer_flux:FluxTransformer2DModel",
        config=config,
        inputs=lambda: _flux_inputs(config, side, text, batch),
        call=_call_flux,
        adapted=(*ATTENTION, *FEED_FORWARD),
    )


def _unet(config: Mapping[str, Any], side: int, text: int, batch: int = 1) -> Case:
    return Case(
        ours=f"{PIPELINES}.stable_diffusion.unet:UNet",
        theirs="diffusers.models.unets.unet_2d_condition:UNet2DConditionModel",
        config=config,
        inputs=lambda: {
            "latents": noise("latents", (batch, side, side, 4)),
            "timesteps": np.linspace(900, 100, batch, dtype=np.float32),
            "text": noise("text", (batch, text, config["cross_attention_dim"])),
        },
        call=_call_unet,
        images=True,
    )


def _embedded(folder: str) -> dict[str, Any]:
    config = json.loads((ROOT / "mflux_vae_train/pipelines" / folder / "config.json").read_text())
    return {name: value for name, value in config.items() if name != "_class_name"}


FLUX1: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
FLUX2: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1536,
    "axes_dims_rope": (32, 32, 32, 32),
}
UNET: dict[str, Any] = {
    "block_out_channels": (160, 320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 768,
}
Z_IMAGE: dict[str, Any] = {
    "dim": 1024,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 8,
    "cap_feat_dim": 1024,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}
CASES: Mapping[str, Case] = {
    "FLUX transformer 2+4 blocks, width 1024, 256+128 tokens": _flux(FLUX1, 16, 128),
    "embedded FLUX, 16+16 tokens, batch 8": _flux(_embedded("tiny/weights/transformer"), 4, 16, 8),
    "SD UNet, widths 160 to 640, 32x32 latents": _unet(UNET, 32, 77),
    "embedded SD UNet, 8x8 latents, batch 8": _unet(_embedded("tiny_sd/weights/unet"), 8, 16, 8),
    "FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens": Case(
        ours=f"{PIPELINES}.flux2.transformer:Flux2Transformer",
        theirs="diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",
        config=FLUX2,
        inputs=lambda: _flux_inputs(FLUX2, 16, 128, 1),
        call=_call_flux,
    ),
    "Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens": Case(
        ours=f"{PIPELINES}.z_image.transformer:ZImageTransformer",
        theirs="diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel",
        config=Z_IMAGE,
        inputs=lambda: {
            "latents": noise("latents", (1, 32, 32, 16)),
            "timestep": np.array([0.4], np.float32),
            "caption": noise("text", (1, 128, Z_IMAGE["cap_feat_dim"])),
            "lengths": np.array([128], np.int32),
        },
        call=_call_z_image,
    ),
}


def rows(options: Options) -> list[Row]:
    """The measurements."""
    works = {"forward": ("ours", "diffusers"), "LoRA training step": ("our_step", "diffusers_step")}
    return [
        Row(
            work=f"{name}, {work}",
            ours=Implementation(
                name="mflux-vae",
                build=f"benchmarks.denoisers:{ours}",
                settings={"case": name},
                imports=(
                    case.ours.partition(":")[0],
                    "mflux_vae_train.lora",
                    "mflux_vae_train.training.step",
                    "mflux_vae_train.optimizers",
                ),
            ),
            peers=[
                Implementation(
                    name=torch,
                    build=f"benchmarks.denoisers:{theirs}",
                    settings={"case": name, **variant},
                    imports=("peft", case.theirs.partition(":")[0], "torch"),
                    optional=variant["compiled"],
                )
                for torch, variant in options.torch_variants(images=case.images).items()
            ],
            target=1.2,
        )
        for name, case in CASES.items()
        for work, (ours, theirs) in works.items()
    ]


def ours(case: str) -> Work:
    """This project's network."""
    network, given = _our_network(CASES[case])
    return mlx_work(lambda: {"output": network(**given)})


def our_step(case: str) -> Work:
    """This project's network, adapters and step."""
    import mlx.core as mx
    import mlx.nn as nn

    from mflux_vae_train import lora
    from mflux_vae_train.optimizers.adam import AdamW
    from mflux_vae_train.training.step import Arrays, MicroBatch, Step

    network, given = _our_network(CASES[case])
    lora.add_lora(network, CASES[case].adapted, rank=RANK)
    for path, layer in lora.layers(network).items():
        layer.lora_a = mx.array(_lora_a(path, layer.lora_a.shape[0]).T)

    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        return mx.square(model(**arrays) - 1).mean(), {}

    step = Step(network, AdamW(weight_decay=1e-2), loss, compile=True)
    batch = MicroBatch(arrays=given, weight=1)

    def run() -> dict[str, float]:
        measured = step(0, [batch], RATE)
        return {name: measured[name] for name in ("loss", "grad_norm")}

    return mlx_work(training(run))


def diffusers(case: str, compiled: bool, gpu: bool, channels_last: bool = False) -> Work:
    """diffusers' network."""
    import torch

    network, call, given = _their_network(CASES[case], gpu, channels_last)
    network.eval()
    call = compiled_if(compiled, call)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return {"output": call(network, given)}

    return torch_work(run, torch_device(gpu))


def diffusers_step(case: str, compiled: bool, gpu: bool, channels_last: bool = False) -> Work:
    """diffusers' network, peft's adapters, torch's optimizer."""
    import torch
    from peft import LoraConfig

    network, call, given = _their_network(CASES[case], gpu, channels_last)
    network.requires_grad_(False)
    adapted = [
        path
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and any(fnmatchcase(path, one) for one in CASES[case].adapted)
    ]
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=adapted))
    with torch.no_grad():
        for path in adapted:
            weight = network.get_submodule(path).lora_A["default"].weight
            weight.copy_(torch.from_numpy(_lora_a(path, weight.shape[1])))
    network.train()
    update = torch_update([parameter for parameter in network.parameters() if parameter.requires_grad], RATE)
    loss = compiled_if(compiled, lambda: (call(network, given) - 1).square().mean())
    return torch_work(training(lambda: update(loss())), torch_device(gpu))


def _our_network(case: Case) -> tuple[Any, dict[str, Any]]:
    """The network with weights, and its arguments."""
    import mlx.core as mx

    module, name = case.ours.split(":")
    package = f"{module}_config" if name == "UNet" else module
    config = getattr(import_module(package), f"{name}Config").from_dict(case.config)
    network = getattr(import_module(module), name)(config)
    fill_mlx(network)
    return network, {name: mx.array(array) for name, array in case.inputs().items()}


def _their_network(case: Case, gpu: bool, channels_last: bool) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """The network with weights, how to call it, and our arguments as tensors."""
    import torch

    module, name = case.theirs.split(":")
    network = getattr(import_module(module), name)(**case.config)
    fill_torch(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    given = {name: torch.from_numpy(array).to(torch_device(gpu)) for name, array in case.inputs().items()}
    if case.images and not channels_last:
        given["latents"] = nhwc(given["latents"].permute(0, 3, 1, 2).contiguous())
    return network.to(torch_device(gpu), memory_format=layout), case.call, given


def _lora_a(path: str, width: int) -> np.ndarray:
    return tensor(f"{path}.lora_A", (RANK, width))


if __name__ == "__main__":
    sys.exit(main({"denoisers": rows}, __doc__))
