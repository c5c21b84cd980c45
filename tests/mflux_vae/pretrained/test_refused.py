"""Autoencoders that are recognised but not supported: the message says what works instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mflux_vae import WeightsError
from mflux_vae.pretrained import loading
from mflux_vae.weights.formats.files import write_json
from tests.mflux_vae.naming_samples import write_blank

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen-image": {"_class_name": "AutoencoderKLQwenImage21", "z_dim": 64},
    "wan2.1": {"_class_name": "AutoencoderKLWan", "is_residual": True, "patch_size": 2},
    "AutoencoderDC": {"_class_name": "AutoencoderDC"},
    "AutoencoderKLHunyuanImage": {"_class_name": "AutoencoderKLHunyuanImage"},
}
KEYS = {
    "qwen-image": "encoder.down_blocks.4.resnets.0.norm1.gamma",
    "wan2.1": "encoder.downsamples.0.downsamples.0.residual.0.gamma",
    "preset wan2.1": "vae.encoder.down_blocks.0.resnets.0.norm1.gamma",
    "AutoencoderDC": "encoder.down_blocks.0.0.conv1.weight",
    "diffusers' AutoencoderDC": "decoder.stages.1.op_list.0.main.conv.conv.bias",
    "AutoencoderKLHunyuanImage": "encoder.down_blocks.0.norm1.weight",
}


@pytest.mark.parametrize("instead", CONFIGS)
def test_refused_by_configuration(instead: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIGS[instead])
    with pytest.raises(WeightsError, match=rf"not supported; .*{instead}"):
        loading.describe(tmp_path)  # before a missing weights file is


@pytest.mark.parametrize("instead", KEYS)
def test_refused_by_keys(instead: str, tmp_path: Path) -> None:
    path = write_blank(tmp_path / "a.safetensors", {KEYS[instead]: (4,), "encoder.conv_in.bias": (4,)})
    with pytest.raises(WeightsError, match=rf"not supported; .*{instead}"):
        loading.open_network(path)
