"""diffusers opens the folders and single files written here, with the same weights, and its adapters are read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.weights.formats.files import write_safetensors  # noqa: E402
from mflux_vae.weights.keymaps.diffusers import SAME_NAMES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion import naming  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files import folder  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import write_single_file  # noqa: E402
from mflux_vae_train.pipelines.text.clip_naming import CLIP_ATTENTION  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import (  # noqa: E402
    small_configs,
    small_parts,
)


def assert_same_weights(pipeline: Any, parts: Any, tolerance: float = 0.0) -> None:
    ours = {name: part.get() for name, part in parts.networks.items()} | {"vae": parts.vae.get().network}
    for name, network in ours.items():
        expected = from_mlx(dict(tree_flatten(network.parameters())), SAME_NAMES)
        found = getattr(pipeline, name).state_dict()
        if "text_model.final_layer_norm.bias" not in found:  # transformers 5
            expected = {key.removeprefix("text_model."): value for key, value in expected.items()}
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            np.testing.assert_allclose(found[key].float().numpy(), value, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_opens_a_folder_and_a_single_file(kind: str, tmp_path: Path) -> None:
    configs = small_configs(kind, positions=77)
    parts = small_parts(configs, tmp_path / "tokenizers")
    folder.write(parts, configs, tmp_path / "folder", "float32")
    write_single_file(tmp_path / "a.safetensors", parts, configs, dtype="float32")
    cls = getattr(diffusers, configs.class_name)
    pipeline = cls.from_pretrained(tmp_path / "folder")
    assert_same_weights(pipeline, parts)
    schedule = pipeline.scheduler.config
    assert (schedule.prediction_type, schedule.beta_end) == (configs.schedule.prediction_type, 0.012)
    single = cls.from_single_file(str(tmp_path / "a.safetensors"), config=str(tmp_path / "folder"))
    assert_same_weights(single, parts)


@pytest.mark.parametrize("naming_of", ["peft", "kohya"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_fuses_our_adapters_as_we_do(kind: str, naming_of: str, tmp_path: Path) -> None:
    """On all layers that kohya's scripts adapt, convolutions included, and on the text encoders."""
    configs = small_configs(kind, positions=77)
    parts = small_parts(configs, tmp_path / "tokenizers")
    folder.write(parts, configs, tmp_path / "folder", "float32")
    networks = {name: part.get() for name, part in parts.networks.items()}
    for name, network in networks.items():
        patterns = naming.PRESETS["attention+mlp+proj+resnets"] if name == "unet" else CLIP_ATTENTION
        lora.add_lora(network, patterns, rank=2, alpha=3.0)
        for index, layer in enumerate(lora.layers(network).values()):
            layer.lora_b = 0.1 * mx.sin(mx.arange(layer.lora_b.size) + index).reshape(layer.lora_b.shape)
    if naming_of == "peft":
        lora.save_adapter(networks, tmp_path / "a.safetensors")
    else:
        names = naming.kohya_naming(configs).modules
        tensors = [lora.kohya_tensors(network, names[name]) for name, network in networks.items()]
        write_safetensors(tmp_path / "a.safetensors", {key: one for each in tensors for key, one in each.items()})
    pipeline = getattr(diffusers, configs.class_name).from_pretrained(tmp_path / "folder")
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipeline.fuse_lora(components=[*networks])
    pipeline.unload_lora_weights()
    for network in networks.values():
        lora.fuse(network)
    assert_same_weights(pipeline, parts, tolerance=1e-6)
