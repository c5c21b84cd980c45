"""A run that learns nothing ends, and says why."""

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
    ("denoiser", "wrong", "said"),
    [
        (adapted(0.1), {"size": 0.0}, "learning_rate"),
        (adapted(0.0), {}, "lora_b"),
    ],
)
@pytest.mark.parametrize("update", [1, 7])  # of a run, and of one that goes on after the sixth
def test_the_first_update_with_a_gradient_must_change_something(denoiser, wrong, said, update):
    learning = LearningCheck(denoiser)
    learning(record(update, gradient=0.0))
    with pytest.raises(TrainingError, match=said):
        learning(record(update + 1, **wrong))


def test_updates_may_lack_a_gradient_but_not_for_long():
    learning = LearningCheck(adapted(0.1))
    for update in range(1, 20):  # never three in succession
        learning(record(update, gradient=float(update % PATIENCE == 0)))
    with pytest.raises(TrainingError, match="update 21"):
        for update in range(20, 30):
            learning(record(update, gradient=0.0))


def test_a_run_of_fewer_updates_may_not_lack_all():
    with pytest.raises(TrainingError, match="update 1"):
        LearningCheck(adapted(0.1))(replace(record(1, gradient=0.0), total=1))


def test_a_rate_of_zero_may_change_nothing():
    LearningCheck(adapted(0.1))(record(1, size=0.0, rate=0.0))


def test_full_training_has_no_adapter_to_look_at():
    LearningCheck(FakePipeline().denoiser)(record(1))


def test_a_saved_adapter_is_read_back_without_a_forward_pass(tmp_path, monkeypatch):
    denoiser, path = adapted(0.1), tmp_path / "adapter.safetensors"
    lora.save_adapter({"transformer": denoiser}, path)
    monkeypatch.setattr(type(denoiser), "__call__", lambda *_: pytest.fail("computed"))
    check_adapter({"transformer": denoiser}, path)
    with pytest.raises(TrainingError, match="differs"):
        check_adapter({"transformer": adapted(0.5)}, path)
    lora.save_adapter({"transformer": adapted(0.1), "text_encoder": adapted(0.1)}, path)
    check_adapter({"transformer": denoiser, "text_encoder": adapted(0.1)}, path)


@pytest.mark.parametrize(("b", "said"), [(0.0, "base model"), (float("nan"), "not finite")])
def test_an_adapter_that_was_saved_wrong_is_refused(b, said, tmp_path):
    denoiser, path = adapted(b), tmp_path / "adapter.safetensors"
    lora.save_adapter({"transformer": denoiser}, path)
    with pytest.raises(TrainingError, match=said):
        check_adapter({"transformer": denoiser}, path)
