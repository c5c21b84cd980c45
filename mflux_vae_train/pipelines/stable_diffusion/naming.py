"""Groups of the UNet's layers, their names in kohya's scripts, and instructions for using an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.stable_diffusion.configs import Configs
from mflux_vae_train.pipelines.stable_diffusion.files import keys
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.pipelines.text.clip_naming import kohya_modules

ATTENTION = tuple(f"*.attn?.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
MLP = ("*.ff.net.0.proj", "*.ff.net.2")
PROJECTIONS = ("*.attentions.*.proj_in", "*.attentions.*.proj_out")
RESNETS = (
    *(f"*.resnets.*.{name}" for name in ("conv1", "conv2", "conv_shortcut", "time_emb_proj")),
    "*samplers.0.conv",
)
PRESETS: Mapping[str, Sequence[str]] = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, *MLP),
    "attention+mlp+proj": (*ATTENTION, *MLP, *PROJECTIONS),
    "attention+mlp+proj+resnets": (*ATTENTION, *MLP, *PROJECTIONS, *RESNETS),
    "b-lora": tuple(f"up_blocks.0.attentions.[01].{name}" for name in ATTENTION),
}
"""`attention+mlp+proj` and `...+resnets` have the layers of kohya's scripts, without and with `conv_dim` (LoCon).
`b-lora` has the attention of SDXL's blocks for content and for style (arXiv 2403.14572)."""

_BLOCK = (
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
"""Layers of a transformer block."""

_OUTSIDE_TRANSFORMERS = (".time_emb_proj", ".conv1", ".conv2", ".conv_shortcut", "samplers.0.conv")
"""Ends of the names of layers in resnets and between resolutions."""

_BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
"""kohya's name of a base model, by ModelSpec's."""


def kohya_naming(configs: Configs, clip_skip: int | None = None) -> KohyaNaming:
    """Names for the layers of the UNet and the text encoders: CompVis' in SDXL, diffusers' in Stable Diffusion 1 and 2.

    The other naming is read, too.

    Args:
        clip_skip: as diffusers counts; kohya's scripts count one more.
    """
    layers, xl = _layers(configs.unet), configs.generation == 3
    original, ours = ({_flat(pair[place]): (pair[1],) for pair in layers} for place in (0, 1))
    prefixes = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"} if xl else {"text_encoder": "lora_te"}
    text = {part: kohya_modules(config, prefixes[part]) for part, config in configs.text_encoders.items()}
    architecture = configs.architecture
    return KohyaNaming(
        modules={"unet": {f"lora_unet_{name}": paths for name, paths in (original if xl else ours).items()}, **text},
        metadata={
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if xl else "diffusers",
            "modelspec.prediction_type": configs.schedule.prediction_type.removesuffix("_prediction"),
            "ss_base_model_version": _BASE_VERSIONS[architecture],
            "ss_network_module": "networks.lora",
            "ss_v2": str(configs.generation == 2),
            **({"ss_clip_skip": str(clip_skip + 1)} if clip_skip else {}),
        },
        read_only={"unet": ours if xl else original},
    )


def usage(
    base: str | None, adapter: str, prompt: str, configs: Configs, *, dora: bool, clip_skip: int | None = None
) -> dict[str, str]:
    """Program -> instructions for an adapter in PEFT's naming, as Markdown."""
    name, usual = configs.class_name, configs.recommended
    options = f"num_inference_steps={usual.steps}, guidance_scale={usual.guidance:g}"
    options += f", clip_skip={clip_skip}" if clip_skip else ""
    python = f"""```python
import torch
from diffusers import {name}

pipeline = {name}.from_pretrained({base or "path/to/the/base/model"!r}, torch_dtype=torch.float16)
pipeline.load_lora_weights("path/to/this/folder", weight_name={adapter!r})
image = pipeline({prompt!r}, {options}).images[0]
```"""
    others = (
        "Copy `pytorch_lora_weights_kohya.safetensors`, which `--output_kohya_format` writes, into `models/loras`"
        " (ComfyUI) or `models/Lora` (AUTOMATIC1111, where a prompt ends with `<lora:NAME:1>`)."
    )
    if clip_skip:
        others += f" Set clip skip to {clip_skip + 1} there, which count one more than diffusers."
    no_dora = "kohya's format stores no magnitudes of DoRA. Train with `--fuse` to get a whole pipeline instead."
    return {"diffusers": python, "ComfyUI and AUTOMATIC1111": no_dora if dora else others}


def _layers(config: UNetConfig) -> list[tuple[str, str]]:
    """CompVis' and our names of the layers that kohya's scripts adapt; convolutions outside transformers on demand."""
    found = [pair for pair in keys.unet_layers(config).items() if pair[1].endswith(_OUTSIDE_TRANSFORMERS)]
    for theirs, ours, depth in keys.transformers(config):
        names = [f"transformer_blocks.{index}.{layer}" for index in range(depth) for layer in _BLOCK]
        found += [(f"{theirs}.{layer}", f"{ours}.{layer}") for layer in ("proj_in", *names, "proj_out")]
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_")
