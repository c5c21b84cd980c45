"""Networks from what people have, and back: folders of diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.families import FAMILIES, Family
from mflux_vae.runtime import compute_dtype
from mflux_vae.weights.diffusers import STEM
from mflux_vae.weights.files import DTYPES, read_folder, read_json, write_json, write_safetensors
from mflux_vae.weights.rules import from_mlx, load_strict, to_mlx


def open_network(source: str | Path, dtype: mx.Dtype | None = None) -> nn.Module:
    """Open a folder in diffusers' layout: `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        source: an autoencoder's folder, or a pipeline's, which has one named `vae`.
        dtype: to compute in, if not on a CPU, which always takes float32; None for bfloat16. A network whose
            configuration says that it overflows in float16 (`force_upcast`) takes float32 instead of that.

    Raises:
        WeightsError: files are missing or broken, of an unknown kind, or do not fit the configuration.
        SettingsError: the configuration asks for what the network does not have.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    config = read_json(folder / "config.json")
    family = _family(config, str(folder))
    network = family.build(config)
    tensors = to_mlx(read_folder(folder, STEM), family.tables["diffusers"])
    load_strict(network, tensors, where=str(folder), dtype=_dtype(network, dtype))
    return network


def save_network(network: nn.Module, folder: str | Path, dtype: str = "float32") -> None:
    """Write the folder that `open_network` opens, and diffusers too where it has such a network.

    Args:
        folder: made where it is missing.
        dtype: of the stored weights: float32, float16 or bfloat16.

    Raises:
        SettingsError: another dtype.
        WeightsError: a network of a kind that `open_network` does not know.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    folder = Path(folder)
    config = network.config.to_dict()
    tensors = from_mlx(dict(tree_flatten(network.parameters())), _family(config, str(folder)).tables["diffusers"])
    write_safetensors(folder / f"{STEM}.safetensors", {k: v.astype(DTYPES[dtype]) for k, v in tensors.items()})
    write_json(folder / "config.json", config)


def _dtype(network: Any, asked: mx.Dtype | None) -> mx.Dtype:
    dtype = compute_dtype(asked)
    overflows = dtype == mx.float16 and getattr(network.config, "force_upcast", False)
    return mx.float32 if overflows else dtype


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("_class_name", "AutoencoderKL")
    if name not in FAMILIES:
        raise WeightsError(f"{where}: autoencoders of class {name!r} are not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
