"""A BitsAndBytesConfig, which diffusers' scripts take for QLoRA, as far as MLX's quantization follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae_train.dreambooth.config import DreamBoothSettings

FLAG = "--bnb_quantization_config_path"

_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}


def with_quantization(settings: DreamBoothSettings) -> tuple[DreamBoothSettings, Sequence[str]]:
    """Settings with the bits of the file that ``--bnb_quantization_config_path`` names, if it is given; warnings.

    Raises:
        SettingsError: the file cannot be read, turns neither or both numbers of bits on, or contradicts the settings.
    """
    if (path := settings.bnb_quantization_config_path) is None:
        return settings, ()
    content = _read(path)
    found = [bits for name, bits in _BITS.items() if content.get(name) or content.get(f"_{name}")]
    if len(found) != 1:
        raise SettingsError(f"{FLAG} {path}: one of {' and '.join(_BITS)} must be true; or give --quantize instead")
    if settings.quantize not in (None, found[0]):
        raise SettingsError(f"{FLAG} {path} has {found[0]} bits, and --quantize is {settings.quantize}")
    unused = [name for name in content if name.lstrip("_") not in (*_BITS, "quant_method")]
    without = f"; without effect: {', '.join(unused)}" if unused else ""
    warning = (
        f"{FLAG} is --quantize {found[0]}: MLX's affine quantization, with a scale per group of 64 or 32 inputs, also"
        f" of large text encoders{without}"
    )
    return replace(settings, quantize=found[0]), [warning]


def _read(path: str) -> Mapping[str, Any]:
    try:
        content = parse_json(read_text(Path(path)))
    except FileNotFoundError as error:
        raise SettingsError(f"{FLAG} {path} does not exist; give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{FLAG} {path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{FLAG} {path}: contains a {type(content).__name__}; expected settings by name")
    return content
