"""Groups of FLUX.1's layers, their names in kohya's scripts, and instructions for using an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.usage import FOLDER, MODEL, NO_DORA, diffusers
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig
from mflux_vae_train.pipelines.text.clip_naming import CLIP_ATTENTION as CLIP_ATTENTION
from mflux_vae_train.pipelines.text.clip_naming import kohya_modules

ATTENTION = (
    *(f"*.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"*.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)
MLP = (
    *(f"*.{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")),
    "*.proj_mlp",
    "*.proj_out",  # of single blocks; the transformer's last layer is just "proj_out"
)
PRESETS: Mapping[str, Sequence[str]] = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
"""Layers of a block: original name, and names here. kohya's scripts adapt no layers outside the blocks."""

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer_linear": "proj_out",
    **{
        f"{theirs}_{their}": f"time_text_embed.{ours}_embedder.{our}"
        for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for their, our in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}
"""Layers outside the blocks: original name, and name here. The last modulation has its halves swapped: not read."""

_MFLUX = {
    f"{ff}_linear{i}": f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for i, layer in ((1, "0.proj"), (2, "2"))
}
"""mflux's names of a block's layers that differ."""


def usage(
    base: str | None, adapter: str, prompt: str, recommended: Recommended, *, dora: bool, text_encoder: bool
) -> dict[str, str]:
    """Program -> instructions for an adapter in PEFT's naming, as Markdown."""
    base = base or MODEL
    python = diffusers("FluxPipeline", base, adapter, prompt, steps=recommended.steps, guidance=recommended.guidance)
    shell = f"""```bash
mflux-generate --model {base} --lora {FOLDER}/{adapter} --prompt {shlex.quote(prompt)}
```"""
    if text_encoder:
        shell += "\n\nmflux ignores the part for CLIP. Train with `--fuse` to keep both parts."
    return {"diffusers": python, "mflux": NO_DORA if dora else shell}


def kohya_naming(config: FluxTransformerConfig, clip: CLIPTextConfig) -> KohyaNaming:
    """Names for the blocks of the transformer and of CLIP."""
    modules = {}
    for kind, blocks, count, names in (
        ("double_blocks", "transformer_blocks", config.num_layers, _DOUBLE),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, _SINGLE),
    ):
        for i in range(count):
            for name, members in names.items():
                modules[f"lora_unet_{kind}_{i}_{name}"] = tuple(f"{blocks}.{i}.{member}" for member in members)
    kind = "dev" if config.guidance_embeds else "schnell"
    metadata = {
        "modelspec.architecture": f"flux-1-{kind}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
    }
    read_only = {name: (path,) for name, path in _OUTSIDE.items()} | {
        f"transformer_blocks_{i}_{name}": (f"transformer_blocks.{i}.{path}",)
        for i in range(config.num_layers)
        for name, path in _MFLUX.items()
    }
    return KohyaNaming(
        modules={"transformer": modules, "text_encoder": kohya_modules(clip, "lora_te1")},
        metadata=metadata,
        read_only={"transformer": read_only},
    )
