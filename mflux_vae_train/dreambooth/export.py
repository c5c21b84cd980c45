"""Write the result of a run: an adapter, or trained weights. Each file is written whole or not at all."""

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
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.run_folder import ADAPTER, RunFolder
from mflux_vae_train.pipelines.capabilities import SupportsAdapterExport, SupportsSingleFile
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

KOHYA, FUSED, TRAINED = "pytorch_lora_weights_kohya.safetensors", "fused", "pipeline"
"""File and folders in the output folder; a folder's model in one file has its name with the suffix `SINGLE`."""

SINGLE = ".safetensors"

_KOHYA_SETTINGS = (
    *("learning_rate", "optimizer", "lr_scheduler", "lr_warmup_steps", "max_train_steps"),
    *("gradient_accumulation_steps", "seed"),
)


def check_can_fuse(pipeline: DiffusionPipeline, resolved: ResolvedSettings, denoiser: nn.Module) -> None:
    """
    Args:
        denoiser: its layers. Weights that are not loaded yet may turn out to be quantized: check again then.

    Raises:
        SettingsError: ``--fuse`` is set, and the pipeline cannot save itself or is quantized.
    """
    if not resolved.fuse:
        return
    if not saves_itself(pipeline):
        raise SettingsError(f"--fuse: a {type(pipeline).__name__} cannot save itself; load the adapter instead")
    if resolved.quantize is not None or any(isinstance(layer, nn.QuantizedLinear) for layer in denoiser.modules()):
        raise SettingsError("--fuse: quantized weights cannot hold an adapter; fuse it into the full weights")


def check_single_file(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """
    Raises:
        SettingsError: ``--fuse_single_file`` without a whole pipeline to save, or for one that has no such format.
    """
    if not settings.fuse_single_file:
        return
    if settings.train_mode == "lora" and not settings.fuse:
        raise SettingsError("--fuse_single_file writes the whole pipeline; give --fuse, too")
    if not isinstance(pipeline, SupportsSingleFile):
        raise SettingsError(f"--fuse_single_file: not supported for {pipeline.name}; leave it out")


def result_path(pipeline: DiffusionPipeline, train_mode: str, folder: RunFolder) -> Path:
    """File or folder of the run's result."""
    if train_mode == "lora":
        return folder.adapter
    return folder.root / (TRAINED if saves_itself(pipeline) else "denoiser.safetensors")


def requested_files(folder: RunFolder, settings: DreamBoothSettings) -> list[Path]:
    """Files and folders that the settings request beside the result."""
    whole = FUSED if settings.train_mode == "lora" else TRAINED
    requested = {
        folder.root / KOHYA: settings.output_kohya_format,
        folder.root / FUSED: settings.fuse,
        folder.root / f"{whole}{SINGLE}": settings.fuse_single_file,
    }
    return [path for path, wanted in requested.items() if wanted]


def save_result(pipeline: DiffusionPipeline, resolved: ResolvedSettings, folder: RunFolder) -> Path:
    """Write the adapter in PEFT's naming, which diffusers loads, and with ``--output_kohya_format`` also in kohya's.

    After full training, write the whole pipeline if it has `save_pretrained(folder)`, else the denoiser's weights.

    Returns:
        `result_path`.
    """
    path = result_path(pipeline, resolved.train_mode, folder)
    if resolved.train_mode == "lora":
        save_adapter_files(pipeline, resolved, folder.root)
    elif saves_itself(pipeline):
        _save_whole(pipeline, path, single_file=resolved.fuse_single_file)
    else:
        write_safetensors(path, dict(tree_flatten(pipeline.denoiser.parameters())), {"format": "mlx"})
    return path


def save_adapter_files(
    pipeline: DiffusionPipeline, resolved: ResolvedSettings, folder: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the adapter into a folder, in PEFT's naming and with ``--output_kohya_format`` also in kohya's.

    Args:
        metadata: more entries for the file in PEFT's naming, which is written last.
    """
    if resolved.output_kohya_format:
        _save_for_kohya(pipeline, resolved, folder / KOHYA)
    lora.save_adapter(networks(pipeline, resolved), folder / ADAPTER, metadata)


def save_fused(pipeline: DiffusionPipeline, resolved: ResolvedSettings, folder: RunFolder) -> Path:
    """Fuse the adapter into the pipeline's weights, in place, and write the whole pipeline.

    Returns:
        the pipeline's folder.
    """
    path = folder.root / FUSED
    for network in networks(pipeline, resolved).values():
        lora.fuse(network)
    _save_whole(pipeline, path, single_file=resolved.fuse_single_file)
    return path


def _save_for_kohya(pipeline: DiffusionPipeline, resolved: ResolvedSettings, path: Path) -> None:
    assert isinstance(pipeline, SupportsAdapterExport)  # `plan_trainable` refuses others
    names = kohya_names(pipeline)
    tensors: dict[str, mx.array] = {}
    for prefix, network in networks(pipeline, resolved).items():
        tensors |= lora.kohya_tensors(network, names[prefix])
    metadata = {**pipeline.kohya_naming().metadata, **_kohya_metadata(resolved)}
    trained = [layer for network in networks(pipeline, resolved).values() for layer in lora.layers(network).values()]
    if len({layer.lora_a.shape[1] for layer in trained}) > 1:
        metadata |= dict.fromkeys(("ss_network_dim", "ss_network_alpha"), "Dynamic")  # as kohya's scripts do
    write_safetensors(path, tensors, metadata)


def _kohya_metadata(resolved: ResolvedSettings) -> Mapping[str, str]:
    """Metadata that user interfaces show: kohya's names, and those of github.com/Stability-AI/ModelSpec."""
    name = Path(resolved.output_dir).resolve().name
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolved.resolution}x{resolved.resolution}",
        "modelspec.trigger_phrase": resolved.instance_prompt,
        "ss_output_name": name,
        "ss_network_dim": resolved.rank,
        "ss_network_alpha": resolved.rank,  # the saved tensors contain the scale
        "ss_batch_size_per_device": resolved.train_batch_size,
        **{f"ss_{name}": getattr(resolved, name) for name in _KOHYA_SETTINGS},
    }
    return {key: str(value) for key, value in metadata.items()}


def _save_whole(pipeline: DiffusionPipeline, path: Path, *, single_file: bool) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)  # type: ignore[attr-defined]
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    if single_file:
        assert isinstance(pipeline, SupportsSingleFile)  # see `check_single_file`
        pipeline.save_single_file(path.with_name(f"{path.name}{SINGLE}"))


def saves_itself(pipeline: DiffusionPipeline) -> bool:
    return callable(getattr(pipeline, "save_pretrained", None))
