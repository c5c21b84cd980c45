"""A run that learns nothing ends with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mflux_vae.errors import TrainingError
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.optimization.checks import PATIENCE, LearningCheck, check_adapter
from mflux_vae_train.training.hooks import Record
from tests.contracts.fake import FakePipeline


def record(update, *, gradient=1.0, size=1.0, rate=1e-3):
    metrics = {"loss": 1.0, "grad_norm": gradient, "update_size": size, "learning_rate": rate}
    return Record(update=update, total=99, metrics=metrics, seconds=0.1)


def adapted(b=0.0):
    denoiser = FakePipeline().denoiser
    lora.add_lora(denoiser, ["proj_in", "blocks.*"], rank=2)
    lora.layers(denoiser)["proj_in"].lora_b += b
    return denoiser


@pytest.mark.parametrize(
    ("denoiser", "metrics", "word"),
    [
        (adapted(0.1), {"size": 0.0}, "learning_rate"),
        (adapted(0.0), {}, "lora_b"),
    ],
)
@pytest.mark.parametrize("update", [1, 7])  # of a new run, and of one resumed after update 6
def test_first_update_with_a_gradient_must_change_weights(denoiser, metrics, word, update):
    learning = LearningCheck(denoiser)
    learning(record(update, gradient=0.0))
    with pytest.raises(TrainingError, match=word):
        learning(record(update + 1, **metrics))


def test_one_of_two_networks_may_be_unchanged_for_few_updates():
    """As a text encoder is while all captions are dropped and the empty prompt's encoding is zero."""
    idle = adapted(0.0)
    learning = LearningCheck(adapted(0.1), idle)
    for update in range(1, PATIENCE):
        learning(record(update))
    lora.layers(idle)["proj_in"].lora_b += 0.1
    learning(record(PATIENCE))
    learning = LearningCheck(adapted(0.1), adapted(0.0))
    with pytest.raises(TrainingError, match="lora_b"):
        for update in range(1, PATIENCE + 1):
            learning(record(update))


def test_few_updates_may_have_no_gradient():
    learning = LearningCheck(adapted(0.1))
    for update in range(1, 20):  # never three in a row
        learning(record(update, gradient=float(update % PATIENCE == 0)))
    with pytest.raises(TrainingError, match="update 21"):
        for update in range(20, 30):
            learning(record(update, gradient=0.0))


def test_short_run_without_any_gradient_fails():
    with pytest.raises(TrainingError, match="update 1"):
        LearningCheck(adapted(0.1))(replace(record(1, gradient=0.0), total=1))


def test_learning_rate_zero_may_change_nothing():
    LearningCheck(adapted(0.1))(record(1, size=0.0, rate=0.0))


def test_full_training_has_no_adapter_to_check():
    LearningCheck(FakePipeline().denoiser)(record(1))


def test_saved_adapter_is_compared_without_a_forward_pass(tmp_path, monkeypatch):
    denoiser, path = adapted(0.1), tmp_path / "adapter.safetensors"
    lora.save_adapter({"transformer": denoiser}, path)
    monkeypatch.setattr(type(denoiser), "__call__", lambda *_: pytest.fail("forward pass"))
    check_adapter({"transformer": denoiser}, path)
    with pytest.raises(TrainingError, match="differs"):
        check_adapter({"transformer": adapted(0.5)}, path)
    lora.save_adapter({"transformer": adapted(0.1), "text_encoder": adapted(0.1)}, path)
    check_adapter({"transformer": denoiser, "text_encoder": adapted(0.1)}, path)


@pytest.mark.parametrize(("b", "word"), [(0.0, "base model"), (float("nan"), "not finite")])
def test_invalid_saved_adapter_is_rejected(b, word, tmp_path):
    denoiser, path = adapted(b), tmp_path / "adapter.safetensors"
    lora.save_adapter({"transformer": denoiser}, path)
    with pytest.raises(TrainingError, match=word):
        check_adapter({"transformer": denoiser}, path)
