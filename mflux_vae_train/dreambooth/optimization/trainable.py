"""The networks that a run trains: the denoiser and, with ``--train_text_encoder``, text encoders."""

from __future__ import annotations

import mlx.nn as nn

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.pipeline_features import skeleton_of
from mflux_vae_train.lora import Names, Networks
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsAdapterExport, SupportsTextEncoderTraining
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


def networks(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, nn.Module]:
    """The networks by the prefix of their keys in an adapter file, the denoiser first."""
    found: dict[str, nn.Module] = {pipeline.adapter_prefix: checks.denoiser(pipeline)}
    if settings.train_text_encoder:
        assert isinstance(pipeline, SupportsTextEncoderTraining)  # see `pipeline_features.check`
        found |= pipeline.text_encoders_to_train()
    return found


def skeletons(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, nn.Module]:
    """The same networks for names and shapes of layers; their weights may not be loaded."""
    found = {pipeline.adapter_prefix: skeleton_of(pipeline)}
    if settings.train_text_encoder:
        assert isinstance(pipeline, SupportsTextEncoderTraining)
        found |= pipeline.text_encoder_skeletons()
    return found


def combined(networks: Networks) -> nn.Module:
    """One module for all networks, with children named by prefix; a single network is returned unchanged."""
    if len(networks) == 1:
        return next(iter(networks.values()))
    module = nn.Module()
    for prefix, network in networks.items():
        setattr(module, prefix, network)
    return module


def kohya_names(pipeline: DiffusionPipeline) -> Names:
    """Names of the layers in kohya's scripts by prefix; empty if the pipeline does not know them."""
    return pipeline.kohya_naming().modules if isinstance(pipeline, SupportsAdapterExport) else {}


def adapter_names(pipeline: DiffusionPipeline) -> Names:
    """All names of the layers in files of other programs by prefix; empty if the pipeline does not know them."""
    if not isinstance(pipeline, SupportsAdapterExport):
        return {}
    naming = pipeline.kohya_naming()
    return {prefix: {**naming.read_only.get(prefix, {}), **modules} for prefix, modules in naming.modules.items()}
