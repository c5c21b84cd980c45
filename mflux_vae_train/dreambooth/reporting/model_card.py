"""The model card: README.md in the output folder, as the Hugging Face Hub shows it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from mflux_vae.utils.paths import public_name
from mflux_vae.utils.yaml_io import dump_yaml
from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.dreambooth.best_adapter import read_best
from mflux_vae_train.dreambooth.export import FUSED, KOHYA, SINGLE, TRAINED, saves_itself
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.dreambooth.reporting.held_out import held_out_losses
from mflux_vae_train.dreambooth.run_folder import ADAPTER, RunFolder
from mflux_vae_train.pipelines.capabilities import SharesHostWeights, SupportsAdapterExport
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.hooks import read_metrics

SETTINGS = (
    *("train_mode", "rank", "lora_alpha", "lora_layers", "use_dora", "resolution", "max_train_steps"),
    *("train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate", "train_text_encoder"),
    *("text_encoder_lr", "lr_scheduler", "seed"),
)
"""Settings shown in the card; settings.yaml has all of them."""


def write_model_card(
    pipeline: DiffusionPipeline,
    drawing: DiffusionPipeline,
    resolved: ResolvedSettings,
    folder: RunFolder,
    result: Path,
) -> None:
    """Write base model, prompts, tags, the last preview, how to load the result, and the main settings.

    The metadata declares no licence; the text refers to that of the base model.

    Args:
        drawing: the model that drew the previews. The instructions for other programs are for it.
    """
    base = _base_model(pipeline)
    previews = preview_grid.previews(folder.samples)
    preview = previews[-1][1].relative_to(folder.root).as_posix() if previews else None
    link = _link(pipeline)
    adapter = resolved.train_mode == "lora"
    kind = ("DoRA adapter" if resolved.use_dora else "LoRA adapter") if adapter else "fine-tuned model"
    prompts = ", ".join(f"`{concept.instance_prompt}`" for concept in resolved.subjects)
    parts = [f"# {folder.root.resolve().name}\n\nA {kind} for {link}, trained with DreamBooth on: {prompts}."]
    if preview is not None:
        parts.append(f"![images sampled after training]({preview})")
    if drawing is not pipeline:
        usual = pipeline.recommended
        parts.append(
            f"The previews are by {_link(drawing)}, which takes this adapter as well: {resolved.drawing_steps} steps,"
            f" guidance {resolved.drawing_guidance:g}. The instructions are for it; {link} is used in the same way with"
            f" {usual.steps} steps, guidance {usual.guidance:g}."
        )
    if adapter and isinstance(drawing, SupportsAdapterExport):
        usage = drawing.usage(
            result.name, resolved.instance_prompt, dora=resolved.use_dora, text_encoder=resolved.train_text_encoder
        )
        parts += [f"## In {program}\n\n{text.strip()}" for program, text in usage.items()]
    if (adapter or saves_itself(pipeline)) and not isinstance(pipeline, SharesHostWeights):
        compared = "--scale 0 0.6 1" if adapter else "--compare_base"
        command = f"mflux-dreambooth draw . --prompt {shlex.quote(resolved.instance_prompt)} {compared}"
        parts.append(f"## In mflux-vae\n\nIn this folder:\n\n```bash\n{command}\n```")
    files = [f"`{KOHYA}` is the same adapter in kohya's naming."] if resolved.output_kohya_format else []
    whole = "the whole pipeline" if drawing is pipeline else f"the whole pipeline of {link}"
    files += [f"`{FUSED}/` is {whole} with the adapter fused into its weights."] if resolved.fuse else []
    if resolved.fuse_single_file:
        files.append(
            f"`{FUSED if adapter else TRAINED}{SINGLE}` is the whole model in one file, for ComfyUI and other programs."
        )
    if resolved.keep_best and (best := read_best(folder.best / ADAPTER)) is not None:
        files.append(
            f"`{folder.best.name}/{ADAPTER}` is the adapter after update {best.update}, whose loss on images that were"
            f" not trained was the lowest ({best.loss:.4f})."
        )
        losses = held_out_losses(read_metrics(folder.metrics))
        if losses is not None and not losses.improved:
            files.append(f"The untrained model's loss on them was not higher ({losses.untrained:.4f}).")
    if files:
        parts.append(" ".join(files))
    rows = [(name, getattr(resolved, name)) for name in SETTINGS]
    if (vae := resolved.vae) is not None:
        rows.append(("vae", public_name(vae)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, False))
    parts.append(f"## Training\n\n| | |\n|---|---|\n{table}")
    parts.append(f"## Licence\n\nThis is a derivative of {link}; the licence of the base model applies.")
    write_text(folder.card, _metadata(resolved, base, preview) + "\n\n".join(parts) + "\n")


def _base_model(pipeline: DiffusionPipeline) -> str | None:
    return pipeline.base_model if isinstance(pipeline, SupportsAdapterExport) else None


def _link(pipeline: DiffusionPipeline) -> str:
    """Its page on the Hub, or its name."""
    base = _base_model(pipeline)
    return f"[{base}](https://huggingface.co/{base})" if base else f"`{pipeline.name}`"


def _metadata(resolved: ResolvedSettings, base: str | None, preview: str | None) -> str:
    """The YAML block that the Hub reads."""
    adapter = resolved.train_mode == "lora"
    kinds = ["lora", "template:sd-lora", *(["dora"] if resolved.use_dora else [])] if adapter else []
    metadata: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "diffusers-training", "dreambooth", *kinds],
        "instance_prompt": resolved.instance_prompt,
    }
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if preview is not None:
        metadata["widget"] = [{"text": "; ".join(resolved.validation_prompt), "output": {"url": preview}}]
    return f"---\n{dump_yaml(metadata)}---\n\n"
