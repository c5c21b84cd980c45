"""What the editing of adapters needs of a pipeline."""

from __future__ import annotations

import mlx.nn as nn

from mflux_vae_train.dreambooth.optimization.trainable import adapter_names, kohya_names
from mflux_vae_train.dreambooth.pipeline_features import skeleton_of
from mflux_vae_train.lora.editing.model import Model
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsAdapterExport, SupportsTextEncoderTraining
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


def editable_model(pipeline: DiffusionPipeline) -> Model:
    """Layers and their names; no weights are loaded."""
    networks = {pipeline.adapter_prefix: skeleton_of(pipeline)}
    if isinstance(pipeline, SupportsTextEncoderTraining):
        networks |= pipeline.text_encoder_skeletons()
    return Model(
        name=pipeline.name,
        networks=networks,
        names=adapter_names(pipeline),
        kohya=kohya_names(pipeline),
        metadata=pipeline.kohya_naming().metadata if isinstance(pipeline, SupportsAdapterExport) else {},
    )


def editable_networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that adapters change, by prefix in an adapter's file."""
    found = {pipeline.adapter_prefix: checks.denoiser(pipeline)}
    if isinstance(pipeline, SupportsTextEncoderTraining):
        found |= pipeline.text_encoders_to_train()
    return found
