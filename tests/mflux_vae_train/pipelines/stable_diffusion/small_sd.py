"""Whole pipelines of some ten thousand random weights: Stable Diffusion 1 and 2, and SDXL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.stable_diffusion import configs as published
from mflux_vae_train.pipelines.stable_diffusion.files.parts import stable_diffusion_parts
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline, pipeline_class
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.stable_diffusion.small_text import small_parts
from tests.mflux_vae_train.pipelines.stable_diffusion.small_unet import SD1, SD2, SDXL

RECOMMENDED = Recommended(
    resolution=32,
    size_multiple=8,
    learning_rate=1e-3,
    learning_rate_full=1e-4,
    guidance=2.5,
    steps=3,
    rank=4,
    caption_dropout=0.1,
    prior_loss_weight=0.5,
    weighting_scheme="uniform",
)

UNETS = {
    "sd1": replace(SD1, block_out_channels=(8, 16), cross_attention_dim=20, attention_head_dim=2),
    "sd2": replace(SD2, block_out_channels=(8, 16), cross_attention_dim=20, attention_head_dim=(1, 2)),
    "sdxl": replace(
        SDXL,
        block_out_channels=(8, 16),
        cross_attention_dim=44,
        attention_head_dim=(1, 2),
        projection_class_embeddings_input_dim=14 + 6 * 8,
    ),
}
SCHEDULES = {
    "sd1": published.PNDM,
    "sd2": replace(published.PNDM, prediction_type="v_prediction"),
    "sdxl": published.SDXL.schedule,
}

AUTOENCODER = AutoencoderKLConfig(
    latent_channels=4,
    block_out_channels=(4, 4, 8, 8),
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_add_attention=False,
    scaling_factor=0.7,
)


def small_pipeline(
    folder: Path, model: str = "sd1", schedule: DiscreteSchedule | None = None
) -> StableDiffusionPipeline:
    """Build a pipeline from random weights; the tokenizers' files go into `folder`.

    Args:
        model: "sd1", "sd2" or "sdxl".
    """
    text = small_parts(folder, model)
    encoders = {name: network.get() for name, network in text.networks.items()}
    options: dict[str, Any] = {name: encoder.config for name, encoder in encoders.items()}
    configs = published.Configs(
        unet=UNETS[model],
        vae=AUTOENCODER.to_dict(),
        schedule=schedule or SCHEDULES[model],
        recommended=RECOMMENDED,
        zero_empty_prompt=model == "sdxl",
        **options,
    )
    parts = stable_diffusion_parts(
        unet=drawn(UNet(configs.unet), 2),
        vae=VAE(network=drawn(AutoencoderKL(AUTOENCODER), 3)),
        **encoders,
        **text.tokenizers,
    )
    return pipeline_class(configs)(parts, configs, name="small")
