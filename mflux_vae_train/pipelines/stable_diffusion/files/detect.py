"""What a single file holds: the UNet's configuration from shapes, the kind of model, and what it predicts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.pipelines.stable_diffusion.configs import (
    REPOSITORIES,
    SD_1,
    SD_2,
    SD_2_BASE,
    SDXL,
    Configs,
    recommended,
)
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig

Shapes = Mapping[str, Sequence[int]]

STATE = "state_dict."
"""Beginning of keys in checkpoints of PyTorch Lightning."""

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Beginnings of the UNet's keys: in whole models, and in files that hold it alone."""

_UNSUPPORTED = {
    "Stable Diffusion 3": r".*\bjoint_blocks\.0\..+",
    "Stable Cascade": r"(.*\.)?(clip_txt_mapper\.weight|down_blocks\.1\.0\.channelwise\.0\.weight)",
    "a ControlNet": r"control_model\..+|controlnet_cond_embedding\..+|(.*\.)?input_hint_block\..+",
    "AnimateDiff's motion modules": r".+\.motion_modules\..+",
    "Stable Video Diffusion": r".+\.time_stack\..+",
    "Stable unCLIP": r"noise_augmentor\..+",
    "Playground 2.5, which is trained with EDM's noise levels": r"edm_mean",
    "a latent consistency model, which takes guidance as an input": r"(.*\.)?time_embed\.cond_proj\.weight",
}
"""Kinds of models that are recognized and not supported, and patterns of their keys."""

_DIFFUSERS = "down_blocks.0.resnets.0.norm1.weight"

_BASE_STEPS = "875000"
"""Updates of Stable Diffusion 2's base model, which predicts noise; further ones predict v."""

_CROSS_ATTENTION = re.compile(r".+\.attn2\.to_k\.weight")


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    Attributes:
        prefix: beginning of the UNet's keys.
        base: repository of the published model that the file derives from.
        notes: sentences about what the file does not specify.
    """

    prefix: str
    configs: Configs
    base: str
    notes: tuple[str, ...]


def is_known(keys: Collection[str]) -> bool:
    """Whether these are keys of Stable Diffusion's UNet in CompVis' naming, or of a related model."""
    names = {key.removeprefix(STATE) for key in keys}
    return _prefix(names) is not None or _unsupported(names) is not None or _DIFFUSERS in names


def detect(
    shapes: Shapes, metadata: Mapping[str, str], path: Path, *, configs: Configs | None, prediction_type: str | None
) -> Found:
    """Detect the model in a file.

    Args:
        shapes: of all tensors, by key.
        configs: of the model; None for the published ones, with the UNet's blocks as the shapes show them.
        prediction_type: "epsilon" or "v_prediction"; None for what the file states, or the base model's.

    Raises:
        WeightsError: another kind of model, or no model.
        SettingsError: a model with options that are not supported.
    """
    if (kind := _unsupported(shapes)) is not None:
        raise WeightsError(f"{path}: holds {kind}; give a text-to-image model of Stable Diffusion 1, 2 or XL")
    if (prefix := _prefix(shapes)) is None:
        fix = "put it into a folder unet with its config.json" if _DIFFUSERS in shapes else "give a whole model"
        raise WeightsError(f"{path}: holds no UNet in the naming of single files; {fix}")
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    notes: list[str] = []
    if sum(key.startswith("model_ema.") for key in shapes) > 100:
        notes.append(f"{path}: also holds averaged weights (EMA), which are not used")
    if configs is not None:
        return Found(prefix=prefix, configs=configs, base=_base(configs), notes=(*notes,))
    try:
        unet = unet_config(inside)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"{path}: unknown layers of a UNet ({error})") from error
    configs = _like(unet, path)
    stated = prediction_type or _stated(shapes, metadata)
    if configs is SD_2:
        stated = stated or _stated_by_2(metadata, path)
        if stated is None:
            notes.append(
                f"{path}: does not state what it predicts, assuming v as Stable Diffusion 2.1 at 768 pixels; pass"
                " --prediction_type epsilon for one of the base models at 512 pixels"
            )
        configs = SD_2_BASE if stated == "epsilon" else SD_2
    schedule = configs.schedule
    if stated is not None:
        schedule = replace(schedule, prediction_type="epsilon" if stated == "epsilon" else "v_prediction")
    if "ztsnr" in shapes:
        schedule = replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    like = configs.unet
    unet = replace(unet, sample_size=like.sample_size, upcast_attention=like.upcast_attention)
    configs = replace(configs, unet=unet, schedule=schedule, recommended=recommended(unet, schedule))
    return Found(prefix=prefix, configs=configs, base=_base(configs), notes=(*notes,))


def unet_config(shapes: Shapes) -> UNetConfig:
    """Configuration of a UNet, without what shapes do not show: heads are assumed as in the published models.

    Args:
        shapes: by CompVis' names without prefix, kernels OIHW.

    Raises:
        SettingsError: an unsupported configuration.
        KeyError, ValueError: tensors of another network.
    """
    down, up = list(_levels(shapes, "input_blocks", 1)), list(_levels(shapes, "output_blocks", 0))
    channels = tuple(level.channels for level in down)
    middle = _depth(shapes, "middle_block.1")
    cross = next((shape[1] for key, shape in shapes.items() if _CROSS_ATTENTION.fullmatch(key)), 0)
    projection = next((shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")), ())
    depths = [level.depths for level in down]
    if middle is not None:
        if down[-1].depths is None:
            depths[-1] = middle
        elif _first(down[-1].depths) != middle:
            raise ValueError(f"{middle} transformer blocks in the middle")
    mirrored = [depth if level.depths is not None else None for depth, level in zip(depths[::-1], up, strict=True)]
    reverse = tuple(1 if level.depths is None else level.depths for level in up)
    added = shapes.get("label_emb.0.0.weight")
    linear = len(projection) == 2
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        down_block_types=tuple("DownBlock2D" if level.depths is None else "CrossAttnDownBlock2D" for level in down),
        up_block_types=tuple("UpBlock2D" if level.depths is None else "CrossAttnUpBlock2D" for level in up),
        mid_block_type=_middle(shapes, middle),
        block_out_channels=channels,
        layers_per_block=_one(tuple(level.layers for level in down)),
        cross_attention_dim=cross,
        transformer_layers_per_block=_one(tuple(1 if depth is None else depth for depth in depths)),
        reverse_transformer_layers_per_block=None if mirrored == [level.depths for level in up] else reverse,
        attention_head_dim=tuple(max(1, width // 64) for width in channels) if linear else 8,
        use_linear_projection=linear,
        addition_embed_type=None if added is None else "text_time",
        addition_time_embed_dim=None if added is None else 256,
        projection_class_embeddings_input_dim=None if added is None else added[1],
    )


@dataclass(frozen=True, kw_only=True)
class _Level:
    """Layers at one resolution; `depths` as in UNetConfig, None without attention."""

    channels: int
    layers: int
    depths: int | tuple[int, ...] | None


def _levels(shapes: Shapes, path: str, start: int) -> Iterator[_Level]:
    channels: list[int] = []
    depths: list[int | None] = []
    for number in count(start):
        block = f"{path}.{number}"
        if f"{block}.0.out_layers.3.weight" in shapes:
            channels.append(shapes[f"{block}.0.out_layers.3.weight"][0])
            depths.append(_depth(shapes, f"{block}.1"))
        resampled = any(f"{block}.{name}.weight" in shapes for name in ("0.op", "1.conv", "2.conv"))
        last = f"{path}.{number + 1}.0.out_layers.3.weight" not in shapes
        ends = last and f"{path}.{number + 1}.0.op.weight" not in shapes
        if resampled or ends:
            if len(set(channels)) != 1 or len({depth is None for depth in depths}) != 1:
                raise ValueError(f"{block}: layers of one resolution differ")
            attends = [depth for depth in depths if depth is not None]
            yield _Level(channels=channels[0], layers=len(channels), depths=_one(tuple(attends)) if attends else None)
            channels, depths = [], []
        if ends:
            return


def _depth(shapes: Shapes, path: str) -> int | None:
    """Number of blocks of a transformer; None if there is none."""
    if f"{path}.norm.weight" not in shapes:
        return None
    return next(n for n in count() if f"{path}.transformer_blocks.{n}.norm1.weight" not in shapes)


def _middle(shapes: Shapes, depth: int | None) -> str | None:
    if "middle_block.0.out_layers.3.weight" not in shapes:
        return None
    return "UNetMidBlock2D" if depth is None else "UNetMidBlock2DCrossAttn"


def _first(depths: int | tuple[int, ...]) -> int:
    return depths if isinstance(depths, int) else depths[0]


def _one(values: tuple[Any, ...]) -> Any:
    """The value if all are equal, else all of them."""
    return values[0] if len(set(values)) == 1 else values


def _prefix(keys: Collection[str]) -> str | None:
    return next((prefix for prefix in UNET_PREFIXES if f"{prefix}input_blocks.0.0.weight" in keys), None)


def _unsupported(keys: Collection[str]) -> str | None:
    for kind, pattern in _UNSUPPORTED.items():
        expression = re.compile(pattern)
        if any(expression.fullmatch(key) for key in keys):
            return kind
    return None


def _like(unet: UNetConfig, path: Path) -> Configs:
    """Configurations of the published model whose text encoders a UNet has."""
    by_width = {like.unet.cross_attention_dim: like for like in (SD_1, SD_2, SDXL)}
    like = by_width.get(unet.cross_attention_dim)
    if like is None or unet.pooled_width != like.unet.pooled_width:
        known = first_few([*map(str, by_width)])
        raise WeightsError(f"{path}: holds a UNet for text of width {unet.cross_attention_dim}; known are {known}")
    return like


def _stated(keys: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """What a file says that it predicts, by a key of ComfyUI or metadata."""
    stated = metadata.get("modelspec.prediction_type", "")
    if "v_pred" in keys or stated.startswith("v"):
        return "v_prediction"
    return "epsilon" if stated.startswith("eps") else None


def _stated_by_2(metadata: Mapping[str, str], path: Path) -> str | None:
    """The same for Stable Diffusion 2, by the size of its images, its number of updates or the file's name."""
    text = " ".join([*(metadata.get(f"modelspec.{key}", "") for key in ("architecture", "resolution")), path.name])
    if metadata.get("global_step") == _BASE_STEPS:
        return "epsilon"
    sizes = re.findall(r"512|768", text)
    return {"512": "epsilon", "768": "v_prediction"}[sizes[0]] if sizes else None


def _base(configs: Configs) -> str:
    v = configs.schedule.prediction_type == "v_prediction"
    name = {1: "sd1.5", 2: "sd2.1" if v else "sd2.1-base", 3: "sdxl"}[configs.generation]
    return REPOSITORIES[name]
