"""What a run leaves for use: an adapter, or trained weights. Written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx.utils import tree_flatten

from mflux_vae_train import lora
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


def result_path(pipeline: DiffusionPipeline, train_mode: str, folder: RunFolder) -> Path:
    """Where the result of a run lies."""
    if train_mode == "lora":
        return folder.adapter
    return folder.root / ("pipeline" if _saves_itself(pipeline) else "denoiser.safetensors")


def save_result(pipeline: DiffusionPipeline, train_mode: str, folder: RunFolder) -> Path:
    """Writes the adapter in PEFT's naming (diffusers loads it).

    After full training: the whole pipeline where it can save itself (``save_pretrained(folder)``), otherwise
    the denoiser's weights under its own names.
    """
    path = result_path(pipeline, train_mode, folder)
    if train_mode == "lora":
        lora.save_adapter(pipeline.denoiser, path, pipeline.adapter_prefix)
    elif _saves_itself(pipeline):
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pipeline.save_pretrained(partial)  # type: ignore[attr-defined]
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    else:
        from mflux_vae.weights.files import write_safetensors

        write_safetensors(path, dict(tree_flatten(pipeline.denoiser.parameters())), {"format": "mlx"})
    return path


def _saves_itself(pipeline: DiffusionPipeline) -> bool:
    return callable(getattr(pipeline, "save_pretrained", None))
