"""Training of small UNets: adapter and all weights, text encoders, quantized, resumed to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.weights.formats.files import read_safetensors
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.export import KOHYA
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline


@pytest.fixture
def settings(instance_dir, tmp_path):
    def make(out="out", **changes) -> DreamBoothSettings:
        given = {
            "model": "small",
            "instance_data_dir": str(instance_dir),
            "instance_prompt": "a photo of sks dog",
            "class_prompt": "a photo of a dog",
            "num_class_images": 2,
            "output_dir": str(tmp_path / out),
            "max_train_steps": 3,
            "checkpointing_steps": 2,
            "lr_warmup_steps": 0,
            "lr_scheduler": "constant",
            "learning_rate": 1e-2,
            "gradient_accumulation_steps": 1,
            "num_validation_images": 0,
            "snr_gamma": 5.0,
            "random_flip": True,
        }
        return DreamBoothSettings(**{**given, **changes})

    return make


EVERYTHING = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "clip_skip": 1, "output_kohya_format": True}


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_adapters_of_unet_and_text_encoders(settings, tmp_path, model) -> None:
    def train(out: str, **changes) -> dict[str, mx.array]:
        pipeline = small_pipeline(tmp_path / "parts", model)
        result = DreamBooth(pipeline).train(settings(out, **EVERYTHING, **changes)).result
        return read_safetensors(result)[0]

    whole = train("whole")
    if model == "sdxl":  # its inputs are those of the others and more; resumed to the bit
        train("parts", max_train_steps=2)
        resumed = train("parts", allow_changes=True)
        assert whole.keys() == resumed.keys()
        assert all(mx.array_equal(whole[name], resumed[name]) for name in whole)
    trained = {name.partition(".")[0] for name, value in whole.items() if "lora_B" in name and mx.any(value != 0)}
    assert trained == {"unet", "text_encoder", *(["text_encoder_2"] if model == "sdxl" else [])}
    names = read_safetensors(tmp_path / "whole" / KOHYA)[0]
    beginnings = {name.partition("_text_model")[0] for name in names if not name.startswith("lora_unet_")}
    assert beginnings == ({"lora_te1", "lora_te2"} if model == "sdxl" else {"lora_te"})
    assert "load_lora_weights" in (tmp_path / "whole" / "README.md").read_text()


def test_all_weights_of_unet_and_text_encoder(settings, tmp_path) -> None:
    pipeline = small_pipeline(tmp_path / "parts", "sd2")
    before = {name: np.array(value) for name, value in tree_flatten(pipeline.denoiser.parameters())}
    changes = {"train_mode": "full", "train_text_encoder": True, "learning_rate": 1e-3, "optimizer": "adafactor"}
    changes |= {"num_validation_images": 1, "validation_steps": 3}
    result = DreamBooth(pipeline).train(settings(**changes)).result
    assert len([*(tmp_path / "out" / "samples").glob("step-*")]) == 2
    opened = StableDiffusionPipeline.from_pretrained(result)
    after = dict(tree_flatten(opened.denoiser.parameters()))
    moved = [name for name, value in before.items() if np.abs(value - np.array(after[name])).max() > 2e-3]
    assert len(moved) > len(before) // 2, "half precision on disk"


@pytest.mark.parametrize("changes", [{"quantize": 4, "gradient_checkpointing": True}, {"use_dora": True}], ids=str)
def test_options_of_memory_and_adapters(settings, tmp_path, changes) -> None:
    pipeline = small_pipeline(tmp_path / "parts", "sdxl")
    result = DreamBooth(pipeline).train(settings(prior_preservation="dop", snr_gamma=None, **changes)).result
    assert any(mx.any(value != 0) for name, value in read_safetensors(result)[0].items() if "lora_B" in name)


def test_a_scheme_of_rectified_flow_is_refused_before_anything_is_encoded(settings, tmp_path) -> None:
    with pytest.raises(SettingsError, match="flux_shift"):
        DreamBooth(small_pipeline(tmp_path / "parts")).train(settings(weighting_scheme="flux_shift"))
    assert not (tmp_path / "out").exists()


def test_a_preset_for_the_layers_of_another_model(settings, tmp_path) -> None:
    pipeline = small_pipeline(tmp_path / "parts", "sd1")
    pipeline.lora_presets = lambda: {"b-lora": ["up_blocks.9.*"]}
    with pytest.raises(SettingsError, match="preset"):
        DreamBooth(pipeline).train(settings(lora_layers="b-lora"))
