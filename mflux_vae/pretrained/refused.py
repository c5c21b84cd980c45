"""Published autoencoders that are recognised but not supported, and what works instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mflux_vae.errors import WeightsError


@dataclass(frozen=True, kw_only=True)
class UnsupportedModel:
    """An unsupported autoencoder.

    Attributes:
        title: what it is.
        family: `_class_name` of its config.json.
        signature: pattern of a key that only its files have.
        instead: what works.
    """

    title: str
    family: str
    signature: str
    instead: str


REFUSED = (
    UnsupportedModel(
        title="the autoencoder of Qwen-Image 2.1 (16x, 64 latent channels)",
        family="AutoencoderKLQwenImage21",
        signature=r"encoder\.down_blocks\.4\.resnets\.0\.norm1\.gamma",
        instead="the preset qwen-image opens that of Qwen-Image and Qwen-Image-Edit",
    ),
    UnsupportedModel(
        title="the autoencoder of Wan 2.2 5B (16x, 48 latent channels)",
        family="AutoencoderKLWan",
        signature=r"encoder\.(down_blocks\.0\.resnets\.0\.norm1|downsamples\.0\.downsamples\.0\.residual\.0)\.gamma",
        instead="the preset wan2.1 opens that of Wan 2.1 and Wan 2.2 14B",
    ),
    UnsupportedModel(
        title="DC-AE, the autoencoder of SANA (32x)",
        family="AutoencoderDC",
        signature=r"(encoder|decoder)\.(down_blocks|up_blocks|stages)\.\d\.(\d\.conv1\.weight|op_list\..*)",
        instead="use diffusers' AutoencoderDC",
    ),
    UnsupportedModel(
        title="the autoencoder of HunyuanImage 2.1 (32x, 64 latent channels)",
        family="AutoencoderKLHunyuanImage",
        signature=r"encoder\.down_blocks\.0\.norm1\.weight",
        instead="use diffusers' AutoencoderKLHunyuanImage",
    ),
)
"""The first row that fits counts."""


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise WeightsError for the config.json of a row."""
    for row in REFUSED:
        older = row.family == "AutoencoderKLWan" and not (config.get("is_residual") or config.get("patch_size"))
        if config.get("_class_name") == row.family and not older:
            raise _error(row, where)


def check_keys(keys: Collection[str], where: str) -> None:
    """Raise WeightsError for the keys of a row."""
    for row in REFUSED:
        if any(re.fullmatch(rf"(?:.*\.)?{row.signature}", key) for key in keys):
            raise _error(row, where)


def _error(row: UnsupportedModel, where: str) -> WeightsError:
    return WeightsError(f"{where}: {row.title} is not supported; {row.instead}")
