"""What a run leaves for use: an adapter, or trained weights. Written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.trainable import kohya_names, networks
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.pipelines.capabilities import NamesForKohya
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

KOHYA, FUSED = "pytorch_lora_weights_kohya.safetensors", "fused"
"""Names in the output folder."""


def check_result(pipeline: DiffusionPipeline, settings: DreamBoothSettings, network: nn.Module) -> None:
    """Whether the run can leave what is asked for. (Which layers kohya's naming has, `adapter.described` looks at.)

    Args:
        network: the denoiser, or as much of it as is known by now.

    Raises:
        SettingsError: it cannot, because of the pipeline.
    """
    if not settings.fuse:
        return
    if not _saves_itself(pipeline):
        raise SettingsError(f"--fuse: a {type(pipeline).__name__} cannot save itself; load the adapter instead")
    if settings.quantize is not None or any(isinstance(layer, nn.QuantizedLinear) for layer in network.modules()):
        raise SettingsError("--fuse: quantised weights cannot hold what an adapter adds; fuse it into the full ones")


def result_path(pipeline: DiffusionPipeline, train_mode: str, folder: RunFolder) -> Path:
    """Where the result of a run lies."""
    if train_mode == "lora":
        return folder.adapter
    return folder.root / ("pipeline" if _saves_itself(pipeline) else "denoiser.safetensors")


def save_result(pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder) -> Path:
    """Writes the adapter in PEFT's naming (diffusers loads it), and where it is asked for in kohya's.

    After full training: the whole pipeline where it can save itself (``save_pretrained(folder)``), otherwise
    the denoiser's weights under its own names.

    Returns:
        `result_path`.
    """
    path = result_path(pipeline, settings.train_mode, folder)
    if settings.train_mode == "lora":
        lora.save_adapter(networks(pipeline, settings), path)
        if settings.output_kohya_format:
            _save_for_kohya(pipeline, settings, folder.root / KOHYA)
    elif _saves_itself(pipeline):
        _save_whole(pipeline, path)
    else:
        write_safetensors(path, dict(tree_flatten(pipeline.denoiser.parameters())), {"format": "mlx"})
    return path


def save_fused(pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder) -> Path:
    """Adds the adapter into the weights that it is for, where it then is, and writes the whole pipeline.

    Returns:
        its folder.
    """
    path = folder.root / FUSED
    for network in networks(pipeline, settings).values():
        lora.fuse(network)
    _save_whole(pipeline, path)
    return path


def _save_for_kohya(pipeline: DiffusionPipeline, settings: DreamBoothSettings, path: Path) -> None:
    assert isinstance(pipeline, NamesForKohya)  # `adapter.described` refuses others
    names = kohya_names(pipeline)
    tensors: dict[str, mx.array] = {}
    for prefix, network in networks(pipeline, settings).items():
        tensors |= lora.kohya_tensors(network, names[prefix])
    write_safetensors(path, tensors, {**pipeline.kohya_naming().metadata, **_kohya_metadata(settings)})


def _kohya_metadata(settings: DreamBoothSettings) -> Mapping[str, str]:
    """What readers of such files show: kohya's own names, and those of github.com/Stability-AI/ModelSpec."""
    name = Path(settings.output_dir).resolve().name
    told = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.resolution": f"{settings.resolution}x{settings.resolution}",
        "modelspec.trigger_phrase": settings.instance_prompt,
        "ss_output_name": name,
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.rank,  # what alpha scales is part of the numbers
        "ss_learning_rate": settings.learning_rate,
        "ss_optimizer": settings.optimizer,
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_lr_warmup_steps": settings.lr_warmup_steps,
        "ss_max_train_steps": settings.max_train_steps,
        "ss_batch_size_per_device": settings.train_batch_size,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_seed": settings.seed,
    }
    return {key: str(value) for key, value in told.items()}


def _save_whole(pipeline: DiffusionPipeline, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)  # type: ignore[attr-defined]
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def _saves_itself(pipeline: DiffusionPipeline) -> bool:
    return callable(getattr(pipeline, "save_pretrained", None))
