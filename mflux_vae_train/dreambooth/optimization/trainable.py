"""What a run trains: the denoiser, and beside it the text encoder where that learns, too."""

from __future__ import annotations

import mlx.nn as nn

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.pipeline_features import outline_of
from mflux_vae_train.lora import Names, Networks
from mflux_vae_train.pipelines.capabilities import NamesForKohya, TrainsTextEncoder
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


class Together(nn.Module):
    """Networks as one, for a step that trains all of them: its children, by their prefixes."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        for prefix, network in networks.items():
            setattr(self, prefix, network)


def networks(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, nn.Module]:
    """By the prefixes of their keys in the adapter's file, the denoiser first."""
    found: dict[str, nn.Module] = {pipeline.adapter_prefix: pipeline.denoiser}
    if settings.train_text_encoder:
        assert isinstance(pipeline, TrainsTextEncoder)  # `fitting.check` refuses others
        found[pipeline.text_encoder_prefix] = pipeline.text_encoder_to_train()
    return found


def skeletons(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, nn.Module]:
    """The layers of the same, not loaded if that can be helped."""
    found = {pipeline.adapter_prefix: outline_of(pipeline)}
    if settings.train_text_encoder:
        assert isinstance(pipeline, TrainsTextEncoder)
        found[pipeline.text_encoder_prefix] = pipeline.text_encoder_outline()
    return found


def combined(networks: Networks) -> nn.Module:
    """One module for all: itself where there is one alone."""
    return next(iter(networks.values())) if len(networks) == 1 else Together(networks)


def kohya_names(pipeline: DiffusionPipeline) -> Names:
    """What their layers are called in kohya's scripts; nothing where the pipeline does not know."""
    if not isinstance(pipeline, NamesForKohya):
        return {}
    naming = pipeline.kohya_naming()
    names = {pipeline.adapter_prefix: naming.modules}
    if isinstance(pipeline, TrainsTextEncoder):
        names[pipeline.text_encoder_prefix] = naming.text_modules
    return names
