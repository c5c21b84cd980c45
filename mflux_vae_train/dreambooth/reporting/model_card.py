"""The model card: README.md in the output folder, as the hub shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.export import FUSED, KOHYA
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.pipelines.capabilities import Published
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

_SHOWN = (
    *("train_mode", "rank", "lora_alpha", "lora_layers", "use_dora", "resolution", "max_train_steps"),
    *("train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate", "train_text_encoder"),
    *("text_encoder_lr", "lr_scheduler", "seed"),
)
"""Settings that the card repeats; settings.yaml has all of them."""


def write_model_card(
    pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder, result: Path
) -> Path:
    """Base model, prompt, tags, the last previews, how to load the result, and the settings that matter most.

    Whose licence holds is said, and none is declared: it is the base model's.
    """
    write_text(folder.card, _front(pipeline, settings, folder) + _body(pipeline, settings, folder, result))
    return folder.card


def _front(pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder) -> str:
    """What the hub reads."""
    import yaml

    adapter = settings.train_mode == "lora"
    kinds = ["lora", "template:sd-lora", *(["dora"] if settings.use_dora else [])] if adapter else []
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": ["text-to-image", "diffusers", "diffusers-training", "dreambooth", *kinds],
        "instance_prompt": settings.instance_prompt,
    }
    base = _base_model(pipeline)
    if base is not None:
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    picture = _last_pictures(folder)
    if picture is not None:
        prompts = settings.validation_prompt or (settings.instance_prompt,)
        front["widget"] = [{"text": "; ".join(prompts), "output": {"url": picture}}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"


def _body(pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder, result: Path) -> str:
    base = _base_model(pipeline)
    link = f"[{base}](https://huggingface.co/{base})" if base else f"`{pipeline.name}`"
    adapter = "DoRA adapter" if settings.use_dora else "LoRA adapter"
    what = adapter if settings.train_mode == "lora" else "fine-tuned model"
    prompts = ", ".join(f"`{concept.instance_prompt}`" for concept in settings.subjects)
    parts = [f"# {folder.root.resolve().name}\n\nA {what} for {link}, trained with DreamBooth on: {prompts}."]
    picture = _last_pictures(folder)
    if picture is not None:
        parts.append(f"![pictures after the training]({picture})")
    if settings.train_mode == "lora" and isinstance(pipeline, Published):
        kind = {"dora": settings.use_dora, "text_encoder": settings.train_text_encoder}
        for program, text in pipeline.usage(result.name, settings.instance_prompt, **kind).items():
            parts.append(f"## In {program}\n\n{text.strip()}")
    beside = [
        (settings.output_kohya_format, f"`{KOHYA}` is the same adapter in kohya's naming."),
        (settings.fuse, f"`{FUSED}/` is the whole pipeline with the adapter in its weights."),
    ]
    if also := [text for given, text in beside if given]:
        parts.append(" ".join(also))
    rows = [(name, getattr(settings, name)) for name in _SHOWN]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, False))
    parts.append(f"## Training\n\n| | |\n|---|---|\n{table}")
    parts.append(f"## Licence\n\nThat of the base model, {link}, which this is a derivative of.")
    return "\n\n".join(parts) + "\n"


def _base_model(pipeline: DiffusionPipeline) -> str | None:
    return pipeline.base_model if isinstance(pipeline, Published) else None


def _last_pictures(folder: RunFolder) -> str | None:
    """The last preview, relative to the folder; None where there is none."""
    previews = preview_grid.previews(folder.samples)
    return previews[-1][1].relative_to(folder.root).as_posix() if previews else None
