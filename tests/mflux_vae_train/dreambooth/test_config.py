"""Validation and conversion of settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings

NEEDED = {"model": "tiny", "instance_data_dir": "pictures", "instance_prompt": "a photo of sks dog"}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("train_batch_size", 0, "at least 1"),
        ("train_batch_size", 2.0, "a whole number"),
        ("train_batch_size", True, "a whole number"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", float("nan"), "a number"),
        ("adam_beta2", 1.0, "below 1"),
        ("lr_scheduler", "cosin", "linear, cosine, cosine_with_restarts"),
        ("train_mode", "dora", "lora, full"),
        ("dry_run", "yes", "true or false"),
        ("instance_prompt", None, "text"),
        ("rank", 0, "at least 1"),
    ],
)
def test_errors_name_flag_value_and_allowed_values(name: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        DreamBoothSettings(**(NEEDED | {name: value}))
    assert f"--{name}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_prompts_and_adapter_flags_in_full_mode_are_refused() -> None:
    with pytest.raises(SettingsError, match="instance_prompt is empty"):
        DreamBoothSettings(**(NEEDED | {"instance_prompt": "  "}))
    with pytest.raises(SettingsError, match="class_prompt is empty"):
        DreamBoothSettings(**NEEDED, class_prompt="")
    with pytest.raises(SettingsError, match="--rank, --lora_dropout"):
        DreamBoothSettings(**NEEDED, train_mode="full", rank=4, lora_dropout=0.1)


@pytest.mark.parametrize(
    "folders",
    [
        {"output_dir": "pictures"},
        {"class_data_dir": "x/../pictures/"},
        {"output_dir": "out", "class_data_dir": Path("out")},
    ],
)
def test_one_folder_for_two_purposes_is_refused(folders: dict) -> None:
    with pytest.raises(SettingsError, match="are the same folder") as caught:
        DreamBoothSettings(**(NEEDED | folders))
    assert all(f"--{name}" in str(caught.value) for name in list(folders)[-1:])
    DreamBoothSettings(**NEEDED, output_dir="pictures/out", class_data_dir="pictures/out/class")


def test_integers_become_floats_and_paths_become_strings() -> None:
    settings = DreamBoothSettings(**(NEEDED | {"instance_data_dir": Path("a/b"), "guidance": 7}))
    assert settings.instance_data_dir == "a/b"
    assert isinstance(settings.guidance, float)


def test_settings_are_frozen_and_have_help() -> None:
    settings = DreamBoothSettings(**NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]
    assert all(field.metadata["help"] for field in dataclasses.fields(settings))


def test_optimizer_names_ignore_case() -> None:
    assert DreamBoothSettings(**NEEDED, optimizer="AdamW").optimizer == "adamw"
    for given in ({"use_8bit_adam": True}, {"optimizer": "AdamW8bit"}):
        assert DreamBoothSettings(**(NEEDED | given)).optimizer == "adamw8bit"
    with pytest.raises(SettingsError, match=r"use_8bit_adam.*prodigy"):
        DreamBoothSettings(**NEEDED, optimizer="prodigy", use_8bit_adam=True)
