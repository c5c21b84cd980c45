"""Settings files of mflux-train: each setting has a counterpart here, is named in the warning, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.pipelines.mflux.train_json import translate
from mflux_vae_train.settings.flags import settings_from

FILE: dict[str, Any] = {
    "model": "flux2-klein-base-4b",
    "model_path": None,
    "data": "images/",
    "seed": 4,
    "steps": 40,
    "guidance": 4.0,
    "quantize": 8,
    "max_resolution": 1000,
    "low_ram": False,
    "training_loop": {"num_epochs": 50, "batch_size": 2, "timestep_low": 4, "timestep_type": "sigmoid"},
    "optimizer": {
        "name": "AdamW",
        "learning_rate": 1e-4,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.5,
        "optimizer_params": {"betas": [0.8, 0.95], "eps": 1e-7},
    },
    "checkpoint": {"save_frequency": 15, "output_path": "training"},
    "monitoring": {"preview_width": 1280, "plot_frequency": 20, "generate_image_frequency": 16},
    "lora_layers": {
        "targets": [
            {"module_path": "transformer_blocks.{block}.attn.to_out", "blocks": {"start": 0, "end": 12}, "rank": 8},
            {"module_path": "single_transformer_blocks.{block}.attn.to_out", "blocks": {"indices": [3, 17]}, "rank": 8},
            {"module_path": "x_embedder", "rank": 4, "alpha": 2},
        ]
    },
}
OLD: dict[str, Any] = {
    "model": "dev",
    "seed": 42,
    "width": 512,
    "height": 512,
    "training_loop": {"num_epochs": 100, "batch_size": 1},
    "optimizer": {"name": "Adam", "learning_rate": 1e-4},
    "save": {"output_path": "out", "checkpoint_frequency": 10},
    "instrumentation": {"plot_frequency": 1, "generate_image_frequency": 20, "validation_prompt": "photo of sks dog"},
    "lora_layers": {
        "single_transformer_blocks": {
            "block_range": {"start": 37, "end": 38},
            "layer_types": ["proj_out", "attn.to_q"],
            "lora_rank": 4,
        }
    },
    "examples": {"path": "images/", "images": [{"image": "1.png", "prompt": "photo of sks dog"}]},
}


def read(folder: Path, content: Any, *flags: str, name: str = "train.json") -> DreamBoothSettings:
    (folder / name).write_text(json.dumps(content))
    return settings_from(DreamBoothSettings, ["--config", str(folder / name), *flags], translate=translate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "1.txt").write_text("photo of sks dog\n")
    (tmp_path / "images" / "preview_beach.txt").write_text("sks dog on a beach\n")
    return tmp_path


def test_a_file_of_mflux_train(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = read(folder, FILE, "--seed=7", name="train.conf")  # known by its content
    expected = {
        "model": "black-forest-labs/FLUX.2-klein-base-4B",
        "instance_data_dir": str(folder / "images"),
        "instance_prompt": "photo of sks dog",
        "validation_prompt": ("sks dog on a beach",),
        "seed": 7,
        "guidance": 4.0,
        "quantize": 8,
        "num_inference_steps": 40,
        "resolution": 992,
        "use_aspect_ratio_buckets": True,
        "num_train_epochs": 50,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "weighting_scheme": "logit_normal",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": 0.5,
        "adam_weight_decay": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "output_dir": "training",
        "checkpointing_steps": 4,
        "validation_steps": 4,
        "num_validation_images": 1,
        "prior_preservation": "none",
        "lora_layers": "transformer_blocks.[0123456789].attn.to_out.0,transformer_blocks.1[01].attn.to_out.0,"
        "single_transformer_blocks.[3].attn.to_out,single_transformer_blocks.1[7].attn.to_out,x_embedder",
        "rank": 8,
        "lora_alpha": None,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    (warning,) = [record.getMessage() for record in caplog.records]
    for name in ("timestep_low", "preview_width", "plot_frequency", "rank 4", "lora_alpha 2"):
        assert name in warning
    assert "low_ram" not in warning


def test_a_file_of_an_older_release(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = read(folder, OLD)
    assert (settings.model, settings.resolution, settings.rank, settings.output_dir) == ("dev", 512, 4, "out")
    assert settings.lora_layers == "single_transformer_blocks.3[7].proj_out,single_transformer_blocks.3[7].attn.to_q"
    assert settings.instance_prompt == "photo of sks dog" == settings.validation_prompt[0]
    assert (settings.optimizer, settings.adam_weight_decay, settings.use_aspect_ratio_buckets) == ("adam", 0.0, False)
    assert "images" in caplog.text  # a second image lies in the folder


def test_schedules_without_effect_are_named_and_missing_prompts_are_missing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"name": "Adam", "learning_rate": 1e-4, "lr_schedule": "cosine"}
    assert read(folder, FILE | {"optimizer": rates}).lr_scheduler == "constant"
    assert "lr_schedule cosine" in caplog.text
    assert read(folder, FILE | {"optimizer": rates | {"lr_total_steps": 9}}).lr_scheduler == "cosine"
    assert "lr_total_steps 9 (the cosine" in caplog.text
    examples = {"path": "images/", "images": [{"image": "1.png"}, {"image": "2.png"}]}
    with pytest.raises(SettingsError, match="instance_prompt"):
        read(folder, OLD | {"examples": examples})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"guidence": 1}, "guidance"),
        ({"optimizer": {"learning_rat": 1}}, "learning_rate"),
        ({"data": None}, "folder"),
        ({"examples": {"path": "images/", "images": [{"image": "1.png"}, {"image": "lost.png"}]}}, r"lost\.png"),
        ({"lora_layers": {"targets": [{"path": "x"}]}}, "lora_layers"),
        ({"training_loop": {"num_epochs": "many"}}, "num_train_epochs"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        read(folder, FILE | change)


def test_pairs_for_editing_are_refused_and_other_files_pass(folder: Path) -> None:
    plain = {"lora_layers": "attention", "model": "tiny", "instance_data_dir": "x", "instance_prompt": "a"}
    assert read(folder, plain).lora_layers == "attention"
    for name in ("3_in.png", "3_out.png"):
        (folder / "images" / name).touch()
    with pytest.raises(SettingsError, match="edit"):
        read(folder, FILE)
