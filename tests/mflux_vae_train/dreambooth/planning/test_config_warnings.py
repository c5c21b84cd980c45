"""Warnings about settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizer
from mflux_vae_train.dreambooth.planning.config_warnings import config_warnings
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.planning.test_resolve import resolved


def test_settings_outside_usual_ranges_are_warnings():
    def warnings_for(**given):
        settings = DreamBoothSettings(
            model="fake", instance_data_dir="pictures", instance_prompt="a photo of sks dog", **given
        )
        recommended = replace(FakePipeline.recommended, guidance=7.5)
        return config_warnings(settings, recommended, preservation="class_images", updates=800)

    assert warnings_for() == []
    assert warnings_for(train_batch_size=4, gradient_accumulation_steps=8) == []
    assert warnings_for(train_mode="full", learning_rate=5e-6) == []
    (slow,) = warnings_for(learning_rate=5e-6)
    assert slow == "--learning_rate is 5e-06; usual with --train_mode lora is 1e-05 to 0.001"
    assert warnings_for(optimizer="prodigy", learning_rate=1.0) == []
    (low,) = warnings_for(optimizer="prodigy", learning_rate=1e-4)
    assert "usual with --optimizer prodigy is 0.1 to 2" in low
    unusual = {"train_batch_size": 5, "gradient_accumulation_steps": 9, "guidance": 4, "num_class_images": 200}
    assert sorted(line.split()[0] for line in warnings_for(**unusual)) == sorted(f"--{name}" for name in unusual)


def test_training_a_distilled_model_is_a_warning():
    settings = DreamBoothSettings(model="fake", instance_data_dir="pictures", instance_prompt="a photo of sks dog")
    recommended = replace(FakePipeline.recommended, train_instead="owner/base")
    (line,) = config_warnings(settings, recommended, preservation="class_images", updates=800)
    assert "owner/base" in line


def test_the_rate_is_judged_after_scaling_and_the_chosen_one_as_a_given_one():
    def rates(**given):
        return [line for line in resolved(lr_warmup_steps=0, **given).warnings if line.startswith("--learning_rate")]

    (line,) = rates(learning_rate=1e-4, scale_lr=True, gradient_accumulation_steps=8, train_batch_size=4)
    assert "is 0.0032" in line
    assert not rates(learning_rate=1e-6, scale_lr=True, gradient_accumulation_steps=8, train_batch_size=4)
    for given in ({}, {"train_mode": "full"}, {"optimizer": "lion"}, {"optimizer": "prodigy"}):
        assert not rates(**given) and not rates(**given, learning_rate=resolved(**given).learning_rate)
    (line,) = rates(scale_lr=True)
    assert "--scale_lr" in line


def test_a_schedule_that_does_not_fit_the_run_is_a_warning():
    assert any("shortened" in line for line in resolved(max_train_steps=4, lr_warmup_steps=40).warnings)
    default = resolved(max_train_steps=4)  # nobody asked for that warm-up
    assert any("shortened" in line for line in default.notes) and not any(
        "warm-up" in line for line in default.warnings
    )
    given = {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 300, "max_train_steps": 40, "lr_warmup_steps": 0}
    (line,) = resolved(**given).warnings
    assert "300 cycles" in line


def test_no_class_images_mean_no_prior_preservation():
    run = resolved(num_class_images=0)
    assert run.prior_preservation == "none" and not run.warnings
    assert "--num_class_images 0" in " ".join(run.notes)
    assert resolved(num_class_images=0, prior_preservation="dop").prior_preservation == "dop"
    for given in ({"prior_preservation": "class_images"}, {"with_prior_preservation": True}):
        with pytest.raises(SettingsError, match="--prior_preservation none"):
            resolved(num_class_images=0, **given)


def test_settings_without_effect_are_warnings():
    def named(**given):
        return [line.split()[0] for line in resolved(**given).warnings if "no effect" in line]

    assert named(logit_mean=0.5, mode_scale=1.0) == ["--logit_mean", "--mode_scale"]
    assert named(num_crops=3) == ["--num_crops"] and not named(num_crops=3, center_crop=False)
    of_pictures = {"class_data_dir": "dogs", "num_class_images": 20}
    assert named(prior_preservation="dop", **of_pictures) == ["--class_data_dir", "--num_class_images"]
    assert not named(**of_pictures)
    assert named(with_prior_preservation=False, prior_loss_weight=0.5) == ["--prior_loss_weight"]
    assert named(logging_dir="there") == ["--logging_dir"]


@pytest.mark.parametrize(
    ("name", "other", "chosen_by"),
    [
        ("lr_num_cycles", 3, {"lr_scheduler": "cosine_with_restarts"}),
        ("lr_power", 2.0, {"lr_scheduler": "polynomial"}),
        ("prodigy_beta3", 0.9, {"optimizer": "prodigy"}),
        ("prodigy_decouple", False, {"optimizer": "prodigy"}),
    ],
)
def test_settings_of_another_schedule_or_optimizer_are_warnings(name, other, chosen_by):
    assert not any(name in line for line in resolved(**{name: other}, **chosen_by).warnings)
    assert sum(line.startswith(f"--{name} has no effect") for line in resolved(**{name: other}).warnings) == 1


def test_warnings_agree_with_the_options_of_each_optimizer():
    names = ("adam_beta1", "adam_beta2", "adam_epsilon")
    for optimizer in ("adamw", "adamw8bit", "adafactor", "lion", "prodigy"):
        run = resolved(optimizer=optimizer, **dict.fromkeys(names, 0.5))
        options = vars(build_optimizer(run))
        unused = {name for name in names if any(line.startswith(f"--{name} has") for line in run.warnings)}
        assert unused == {name for name in names if name.removeprefix("adam_") not in options}
