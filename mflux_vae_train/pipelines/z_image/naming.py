"""Groups of Z-Image's layers, their names in other programs, and instructions for using an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.usage import FOLDER, MODEL, NO_DORA, diffusers
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.z_image.transformer import KIND, ZImageTransformerConfig

_ATTENTION, _MLP = (
    tuple(f"{part}.{name}" for name in names)
    for part, names in (("attention", ("to_q", "to_k", "to_v", "to_out.0")), ("feed_forward", ("w1", "w2", "w3")))
)
PRESETS: Mapping[str, Sequence[str]] = {
    "attention": tuple(f"*.{layer}" for layer in _ATTENTION),
    "attention+mlp": tuple(f"*.{layer}" for layer in (*_ATTENTION, *_MLP)),
    "attention-without-refiners": tuple(f"layers.*.{layer}" for layer in _ATTENTION),
}
"""Diffusers' script and SimpleTuner adapt the attention of all blocks; OneTrainer leaves out the refiners."""

_BLOCK = {
    "attention_qkv": _ATTENTION[:3],
    "attention_out": _ATTENTION[3:],
    **{layer.replace(".", "_"): (layer,) for layer in _MLP},
}
"""Layers of a block: original name, and names here."""

_OUTSIDE = {
    "x_embedder": f"all_x_embedder.{KIND}",
    "final_layer_linear": f"all_final_layer.{KIND}.linear",
    "final_layer_adaLN_modulation_1": f"all_final_layer.{KIND}.adaLN_modulation.1",
}
"""Layers outside the blocks whose original names differ."""


def kohya_naming(config: ZImageTransformerConfig) -> KohyaNaming:
    """Names for the blocks of the transformer."""
    blocks = [f"layers.{i}" for i in range(config.n_layers)]
    refiners = ("noise_refiner", "context_refiner")
    blocks += [f"{refiner}.{i}" for refiner in refiners for i in range(config.n_refiner_layers)]
    modules = {
        f"lora_unet_{block.replace('.', '_')}_{name}": tuple(f"{block}.{member}" for member in members)
        for block in blocks
        for name, members in _BLOCK.items()
    }
    metadata = {
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "ss_network_module": "networks.lora_zimage",
    }
    read_only = {name: (path,) for name, path in _OUTSIDE.items()}
    return KohyaNaming(modules={"transformer": modules}, metadata=metadata, read_only={"transformer": read_only})


def usage(base: str | None, adapter: str, prompt: str, recommended: Recommended, *, dora: bool) -> dict[str, str]:
    """Program -> instructions for an adapter in PEFT's naming, as Markdown."""
    steps, guidance, distilled = recommended.steps, recommended.guidance, recommended.train_instead is not None
    base = base or MODEL
    python = diffusers("ZImagePipeline", base, adapter, prompt, steps=steps, guidance=guidance)
    command = "mflux-generate-z-image" + ("-turbo" if distilled else f" --guidance {guidance:g}")
    shell = f"""```bash
{command} --model {base} --steps {steps} --lora {FOLDER}/{adapter} --prompt {shlex.quote(prompt)}
```"""
    comfy = f"Copy `{adapter}` to `models/loras`, and load it with the node `LoraLoaderModelOnly`."
    return {"diffusers": python, "mflux": NO_DORA if dora else shell, "ComfyUI": comfy}
