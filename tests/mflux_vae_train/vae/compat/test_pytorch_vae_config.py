"""Nested settings files of PyTorch-VAE: every setting is translated, wrong ones are rejected."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from mflux_vae import SettingsError
from mflux_vae_train.settings.flags import settings_of
from mflux_vae_train.vae.compat.pytorch_vae_config import SECTIONS, flatten_sections
from mflux_vae_train.vae.config import PRESETS, VAETrainingSettings, preset
from tests.conftest import Run

FILE = """
model_params:
  name: 'VanillaVAE'
  in_channels: 3
  hidden_dims: [64, 128, 256]
  latent_dim: 12
  image_size: 128
data_params:
  data_path: "/videos/frames"
  image_size: 128
  train_batch_size: 16
  val_batch_size: 8
  num_workers: 4
  pin_memory: true
exp_params:
  LR: 2.0e-4
  weight_decay: 0.01
  scheduler_gamma: 0.9
  kld_weight: 0.0003
  max_grad_norm: 2.0
trainer_params:
  gpus: -1
  max_epochs: 7
  gradient_clip_val: 2.0
  check_val_every_n_epoch: 3
  log_every_n_steps: 50
logging_params:
  save_dir: "logs_vae"
  name: "VanillaVAE_sthv2"
  save_every_n_steps: 5000
  log_images_every_n_steps: 4000
"""


def settings(path: Path, content: Any, **flags: str) -> VAETrainingSettings:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return settings_of(VAETrainingSettings, {"config": str(path), **flags}, PRESETS, translate=flatten_sections)


def test_every_setting_is_translated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read = settings(tmp_path / "config_vae_sthv2.yaml", FILE)
    assert read == preset(
        "vanilla-256",
        **{"in_channels": 3, "hidden_dims": (64, 128, 256), "latent_dim": 12, "image_size": 128},
        **{"data": "/videos/frames", "data_kind": "frames", "batch_size": 16, "num_epochs": 7, "val_every": 3},
        **{"learning_rate": 2e-4, "weight_decay": 0.01, "lr_gamma": 0.9, "beta": 3e-4, "max_grad_norm": 2.0},
        **{"output_dir": "logs_vae", "experiment_name": "VanillaVAE_sthv2"},
        **{"save_every_n_steps": 5000, "log_images_every_n_steps": 4000},
    )
    ignored = {"data_params.val_batch_size", "data_params.num_workers", "data_params.pin_memory"}
    ignored |= {"trainer_params.gpus", "trainer_params.log_every_n_steps"}
    assert {record.getMessage().split()[0] for record in caplog.records} == ignored
    assert all("effect" in record.getMessage() for record in caplog.records)


def test_the_example_has_all_known_names() -> None:
    """The file above and the table have the same names."""
    content = yaml.safe_load(FILE)
    assert {section: set(keys) for section, keys in content.items()} == {s: set(keys) for s, keys in SECTIONS.items()}


def test_flags_override_and_other_files_are_unchanged(tmp_path: Path) -> None:
    read = settings(tmp_path / "a.yaml", FILE, latent_dim="5", preset="mnist")
    assert (read.latent_dim, read.output, read.hidden_dims) == (5, "sigmoid", (64, 128, 256))
    assert settings(tmp_path / "a.yaml", {"latent_dim": 7}) == preset("mnist", latent_dim=7)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"exp_params": {"LR": 1.0, "lr": 2.0, "gama": 3}}, r"exp_params\.lr, exp_params\.gama"),
        ({"exp_params": {"LR": 1.0}, "test_params": {"a": 1}}, r"test_params\.a"),
        ({"exp_params": {"LR": 1.0}, "seed": 3}, "seed"),
        ({"exp_params": 1e-4}, "exp_params"),
        ({"model_params": {"name": "BetaVAE"}}, "BetaVAE"),
        (
            {"exp_params": {"max_grad_norm": 1.0}, "trainer_params": {"gradient_clip_val": 2.0}},
            r"exp_params\.max_grad_norm.*trainer_params\.gradient_clip_val",
        ),
        ({"model_params": {"latent_dim": "many"}}, "--latent_dim"),
    ],
)
def test_wrong_settings_are_rejected(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=key):
        settings(tmp_path / "a.yaml", changes)


def test_the_command_reads_nested_files(tmp_path: Path, run: Run) -> None:
    small = {
        "model_params": {"name": "VanillaVAE", "in_channels": 1, "hidden_dims": [2], "latent_dim": 2, "image_size": 8},
        "trainer_params": {"max_epochs": 1, "gpus": 1},
        "logging_params": {"save_dir": str(tmp_path), "name": "mine"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(small))
    command = ("train", "--config", tmp_path / "a.yaml", "--data=digits", "--data_kind=digits", "--data_count=20")
    status, _, error = run(*command)
    assert status == 0 and "trainer_params.gpus" in error, error
    assert (tmp_path / "checkpoints/mine/best_model.safetensors").is_file()
