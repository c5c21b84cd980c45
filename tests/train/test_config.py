"""Settings: what is refused, what only draws advice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.config import DreamBoothSettings, advice

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
def test_a_wrong_value_is_refused_with_flag_value_and_what_is_allowed(name: str, value: object, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        DreamBoothSettings(**(NEEDED | {name: value}))
    assert f"--{name}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_texts_and_adapter_flags_in_full_mode_are_refused() -> None:
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
def test_folders_that_would_take_each_others_pictures_are_refused(folders: dict) -> None:
    with pytest.raises(SettingsError, match="are the same folder") as caught:
        DreamBoothSettings(**(NEEDED | folders))
    assert all(f"--{name}" in str(caught.value) for name in list(folders)[-1:])
    DreamBoothSettings(**NEEDED, output_dir="pictures/out", class_data_dir="pictures/out/class")


def test_documented_ranges_draw_advice_and_forbid_nothing() -> None:
    assert advice(DreamBoothSettings(**NEEDED)) == []
    assert advice(DreamBoothSettings(**NEEDED, train_batch_size=4, gradient_accumulation_steps=8)) == []
    unusual = DreamBoothSettings(
        **NEEDED, train_batch_size=5, gradient_accumulation_steps=9, guidance=4, num_class_images=200
    )
    assert advice(DreamBoothSettings(**NEEDED, train_mode="full", learning_rate=5e-6)) == []
    (slow,) = advice(DreamBoothSettings(**NEEDED, learning_rate=5e-6))
    assert slow == "--learning_rate is 5e-06; usual with --train_mode lora is 1e-05 to 0.001"
    assert advice(DreamBoothSettings(**NEEDED, optimizer="prodigy", learning_rate=1.0)) == []
    (low,) = advice(DreamBoothSettings(**NEEDED, optimizer="prodigy", learning_rate=1e-4))
    assert "usual with --optimizer prodigy is 0.1 to 2" in low
    assert [line.split()[0] for line in advice(unusual)] == [
        "--train_batch_size",
        "--gradient_accumulation_steps",
        "--guidance",
        "--num_class_images",
    ]


def test_whole_numbers_become_floats_and_paths_text() -> None:
    settings = DreamBoothSettings(**(NEEDED | {"instance_data_dir": Path("a/b"), "guidance": 7}))
    assert settings.instance_data_dir == "a/b"
    assert isinstance(settings.guidance, float)


def test_settings_are_frozen_and_every_one_has_help() -> None:
    settings = DreamBoothSettings(**NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]
    assert all(field.metadata["help"] for field in dataclasses.fields(settings))


def test_an_optimizer_may_be_written_as_in_other_programs() -> None:
    assert DreamBoothSettings(**NEEDED, optimizer="AdamW").optimizer == "adamw"
    for given in ({"use_8bit_adam": True}, {"optimizer": "AdamW8bit"}):
        assert DreamBoothSettings(**(NEEDED | given)).optimizer == "adamw8bit"
    with pytest.raises(SettingsError, match=r"use_8bit_adam.*prodigy"):
        DreamBoothSettings(**NEEDED, optimizer="prodigy", use_8bit_adam=True)
