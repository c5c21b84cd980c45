"""A whole model in one file, in CompVis' naming, as ComfyUI, AUTOMATIC1111's web UI and Draw Things read it.

model.diffusion_model.*     UNet
first_stage_model.*         autoencoder
cond_stage_model.*          text encoder: CLIP of Stable Diffusion 1 (.transformer) or OpenCLIP of 2 (.model)
conditioner.embedders.*     text encoders of SDXL: CLIP (.0.transformer) and OpenCLIP (.1.model)
model_ema.*                 averaged weights, not used
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.runtime.threads import exclusive
from mflux_vae.weights.formats.files import DTYPES, convert_safetensors, open_weights
from mflux_vae.weights.formats.lazy_tensor import LazyTensor
from mflux_vae.weights.keymaps.compvis import compvis
from mflux_vae.weights.keymaps.rules import Tensors, from_mlx, to_mlx
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.configs import Configs
from mflux_vae_train.pipelines.stable_diffusion.files import detect, keys
from mflux_vae_train.pipelines.text import clip

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT = {
    1: {"text_encoder": "cond_stage_model.transformer."},
    2: {"text_encoder": "cond_stage_model.model."},
    3: {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
}
"""Beginning of a text encoder's keys, by part; for Stable Diffusion 1, 2 and XL."""

_UNUSED = ("text_projection.", "logit_scale")
"""Beginnings of keys of a first text encoder whose output the UNet does not take."""


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file whose tensors are read when they are needed.

    Attributes:
        configs: of the model. Parts that the file lacks are those of `base`.
        base: repository of the published model that it derives from.
        stored: tensors by part and by their names in the file.
        notes: sentences about what the file does not specify, for warnings.
    """

    path: Path
    configs: Configs
    base: str
    stored: Mapping[str, Mapping[str, LazyTensor]]
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Parts of the model that the file lacks."""
        return [part for part, stored in self.stored.items() if not stored]

    def read(self, part: str) -> dict[str, mx.array]:
        """Tensors of a part by the paths of our parameters, in MLX's layout.

        Raises:
            WeightsError: the file lacks the part; the message names all that it lacks.
        """
        if not self.stored[part]:
            raise WeightsError(f"{self.path}: holds no {' and no '.join(self.missing)}; give a whole model")
        tensors = {key: stored.load() for key, stored in self.stored[part].items()}
        if part == "unet":
            return to_mlx(tensors, keys.original_unet(self.configs.unet))
        if part == "vae":
            return to_mlx(tensors, compvis(tensors))
        second = self.configs.text_encoder_2 if part == "text_encoder_2" else None
        if second is not None:
            return keys.from_open_clip(tensors, second.num_hidden_layers)
        if self.configs.generation == 2:
            tensors = keys.from_open_clip(tensors, self.configs.text_encoder.num_hidden_layers)
        return clip.published_names({key: one for key, one in tensors.items() if not key.startswith(_UNUSED)})


def open_single_file(path: Path, *, configs: Configs | None = None, prediction_type: str | None = None) -> SingleFile:
    """Open a .safetensors or .ckpt file.

    Args:
        configs, prediction_type: see `detect.detect`.

    Raises:
        WeightsError: the file is broken, or holds another kind of model.
        SettingsError: a model with options that are not supported.
    """
    stored, metadata = open_weights(path)
    if any(key.startswith(detect.STATE) for key in stored):
        stored = {key.removeprefix(detect.STATE): one for key, one in stored.items() if key.startswith(detect.STATE)}
    shapes = {key: one.shape for key, one in stored.items()}
    found = detect.detect(shapes, metadata, path, configs=configs, prediction_type=prediction_type)
    prefixes = {"unet": found.prefix, **_TEXT[found.configs.generation], "vae": _VAE}
    if not found.prefix:  # the UNet alone
        parts = {part: stored if part == "unet" else {} for part in prefixes}
    else:
        parts = {
            part: {key.removeprefix(prefix): one for key, one in stored.items() if key.startswith(prefix)}
            for part, prefix in prefixes.items()
        }
    return SingleFile(path=path, configs=found.configs, base=found.base, stored=parts, notes=found.notes)


def write_single_file(
    path: Path, parts: Parts, configs: Configs, *, dtype: str = "float16", title: str | None = None
) -> None:
    """Write a whole model to one safetensors file, tensor by tensor.

    Args:
        dtype: of the stored weights; the programs that read such files expect float16.
        title: name of the model, in the metadata; None for the file's.

    Raises:
        SettingsError: an unknown dtype.
        OSError: the file cannot be written.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    tensors: dict[str, mx.array] = {}
    prefixes = {"unet": _UNET, **_TEXT[configs.generation], "vae": _VAE}
    for part, prefix in prefixes.items():
        module = parts.vae.borrow().network if part == "vae" else parts.networks[part].borrow()
        named = _original(part, dict(tree_flatten(module.parameters())), configs)
        tensors |= {f"{prefix}{key}": tensor for key, tensor in named.items()}
        del module, named  # a network that was loaded for this is freed tensor by tensor
    if configs.schedule.prediction_type == "v_prediction" and configs.text_encoder_2 is not None:
        tensors["v_pred"] = mx.zeros((0,))  # ComfyUI looks for these keys
        if configs.schedule.rescale_betas_zero_snr:
            tensors["ztsnr"] = mx.zeros((0,))
    with exclusive():
        convert_safetensors(path, tensors, DTYPES[dtype], _metadata(configs, title or path.stem))


def _original(part: str, tensors: Tensors, configs: Configs) -> dict[str, mx.array]:
    """Tensors of a part under their names in a single file, in PyTorch's layout."""
    if part == "unet":
        return from_mlx(tensors, keys.original_unet(configs.unet))
    if part == "vae":
        return from_mlx(tensors, compvis(tensors))
    is_open_clip = configs.generation == 2 or part == "text_encoder_2"
    return keys.to_open_clip(tensors) if is_open_clip else dict(tensors)


def _metadata(configs: Configs, title: str) -> dict[str, str]:
    """Keys of ModelSpec (github.com/Stability-AI/ModelSpec), which user interfaces show."""
    side = str(configs.recommended.resolution)
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": configs.architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": configs.schedule.prediction_type.removesuffix("_prediction"),
    }
    return metadata
