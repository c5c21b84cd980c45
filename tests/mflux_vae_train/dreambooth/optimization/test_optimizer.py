"""Settings reach the optimizer and the schedule; default rates suit the optimizer."""

from __future__ import annotations

import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizer, build_schedule, default_rate
from mflux_vae_train.optimizers.adafactor import Adafactor
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.adam8bit import AdamW8bit
from mflux_vae_train.optimizers.lion import Lion
from mflux_vae_train.optimizers.prodigy import Prodigy
from tests.contracts.fake import FakePipeline

RECOMMENDED = FakePipeline.recommended


def settings(**given):
    needed = {"model": "fake", "instance_data_dir": "pictures", "instance_prompt": "a photo of sks dog"}
    return DreamBoothSettings(**(needed | given))


@pytest.mark.parametrize(
    ("name", "kind", "rate"),
    [
        ("adamw", AdamW, RECOMMENDED.learning_rate),
        ("adamw8bit", AdamW8bit, RECOMMENDED.learning_rate),
        ("adafactor", Adafactor, RECOMMENDED.learning_rate),
        ("lion", Lion, RECOMMENDED.learning_rate / 10),
        ("prodigy", Prodigy, 1.0),
    ],
)
def test_each_optimizer_has_a_default_rate(name, kind, rate):
    given = settings(optimizer=name, adam_weight_decay=0.25)
    optimizer = build_optimizer(given)
    assert type(optimizer) is kind and optimizer.weight_decay == 0.25
    assert default_rate(given, RECOMMENDED) == pytest.approx(rate)


def test_full_training_has_a_separate_default_rate():
    assert default_rate(settings(train_mode="full"), RECOMMENDED) == RECOMMENDED.learning_rate_full


def test_options_reach_the_optimizer():
    given = {"adam_beta1": 0.5, "adam_beta2": 0.0, "adam_epsilon": 1e-3}
    for name in ("adamw", "adamw8bit", "prodigy"):
        optimizer = build_optimizer(settings(optimizer=name, **given))
        assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.5, 0.0, 1e-3)
    lion = build_optimizer(settings(optimizer="lion"))
    assert (lion.beta1, lion.beta2) == (0.9, 0.99)
    prodigy = build_optimizer(settings(optimizer="prodigy"))
    assert (prodigy.beta3**2, prodigy.beta2) == (pytest.approx(0.999), 0.999)
    assert prodigy.decouple and prodigy.use_bias_correction and prodigy.safeguard_warmup
    other = {
        "prodigy_beta3": 0.5,
        "prodigy_decouple": False,
        "prodigy_use_bias_correction": False,
        "prodigy_safeguard_warmup": False,
    }
    prodigy = build_optimizer(settings(optimizer="prodigy", **other))
    assert {f"prodigy_{name}": getattr(prodigy, name) for name in ("beta3", "decouple")} == {
        name: other[name] for name in ("prodigy_beta3", "prodigy_decouple")
    }
    assert not prodigy.use_bias_correction and not prodigy.safeguard_warmup


def test_options_reach_the_schedule():
    given = {"lr_warmup_steps": 0, "lr_num_cycles": 2, "lr_power": 2.0}
    restarts = build_schedule(settings(lr_scheduler="cosine_with_restarts", **given), peak=1.0, updates=10)
    assert restarts(0) == restarts(5) == pytest.approx(1.0)
    bent = build_schedule(settings(lr_scheduler="polynomial", **given), peak=1.0, updates=10)
    assert bent(5) == pytest.approx(0.25, rel=1e-5)
