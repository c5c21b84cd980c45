"""Groups of FLUX.2's layers, their names in kohya's scripts, and instructions for using an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.usage import FOLDER, MODEL, NO_DORA, diffusers
from mflux_vae_train.pipelines.flux2 import keys
from mflux_vae_train.pipelines.flux2.configs import PUBLISHED, distilled_of
from mflux_vae_train.pipelines.flux2.transformer import Flux2TransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended

ATTENTION = (
    *(f"transformer_blocks.*.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"single_transformer_blocks.*.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")),
)
"""The default of diffusers' training script. The layers of single blocks also hold their MLP."""

TEXT = tuple(f"transformer_blocks.*.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
MLP = tuple(f"transformer_blocks.*.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out"))
PRESETS: Mapping[str, Sequence[str]] = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *TEXT, *MLP)}


def usage(base: str | None, adapter: str, prompt: str, recommended: Recommended, *, dora: bool) -> dict[str, str]:
    """Program -> instructions for an adapter in PEFT's naming, as Markdown.

    Args:
        recommended: steps and guidance, unless a published distilled model can draw instead.
    """
    trained = base or MODEL
    drawing, steps, guidance = trained, recommended.steps, recommended.guidance
    if (published := distilled_of(base)) is not None:
        few = PUBLISHED[published].recommended
        drawing, steps, guidance = published, few.steps, few.guidance
    note = f"\n\nThis is the distilled model, which draws in {steps} steps." if drawing != trained else ""
    python = diffusers("Flux2KleinPipeline", drawing, adapter, prompt, steps=steps, guidance=guidance) + note
    shell = f"""```bash
mflux-generate-flux2 --model {drawing} --steps {steps} --guidance {guidance:g} \\
  --lora {FOLDER}/{adapter} --prompt {shlex.quote(prompt)}
```"""
    comfyui = (
        f"Copy `{adapter}` to `models/loras`. Load {drawing} with *Load Diffusion Model*, add *LoraLoaderModelOnly*, "
        f"and set {steps} steps and cfg {guidance:g}."
    )
    return {"diffusers": python, "mflux": NO_DORA if dora else shell, "ComfyUI": comfyui}


def kohya_naming(config: Flux2TransformerConfig) -> KohyaNaming:
    """Names for the blocks of the transformer. kohya's scripts adapt no layers outside the blocks."""
    counts = {"double_blocks": config.num_layers, "single_blocks": config.num_single_layers}
    modules = {
        f"lora_unet_{kind}_{i}_{name.replace('.', '_')}": tuple(f"{ours}.{i}.{member}" for member in members)
        for kind, (ours, layers) in keys.BLOCKS.items()
        for i in range(counts[kind])
        for name, members in layers.items()
    }
    read_only = {theirs.replace(".", "_"): (ours,) for theirs, ours in keys.OUTSIDE.items()} | {
        f"time_guidance_embed_linear_{i}": (f"time_guidance_embed.timestep_embedder.linear_{i}",) for i in (1, 2)
    }
    size = "4b" if config.num_attention_heads == 24 else "9b"
    metadata = {
        "modelspec.architecture": f"Flux.2-klein-{size}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "ss_base_model_version": f"flux_2_klein_{size}",
        "ss_network_module": "networks.lora_flux_2",
    }
    return KohyaNaming(modules={"transformer": modules}, metadata=metadata, read_only={"transformer": read_only})
