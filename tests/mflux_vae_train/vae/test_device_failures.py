"""An error of MLX's device in an update, a validation or a preview of an autoencoder's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.errors import DeviceError
from mflux_vae.runtime import device
from mflux_vae_train.training.step import UpdateFailed
from mflux_vae_train.vae.evaluation.validation import Validation
from mflux_vae_train.vae.objective import AdversarialStep, Objective
from tests.conftest import Run
from tests.faults.runs import AUTOENCODER, EXAMPLE, left, same
from tests.helpers.device_failure import CUDA, METAL, fail_update


@pytest.fixture
def train(run: Run, tmp_path: Path) -> Any:
    """`mflux-vae train` with 10 updates, averages and batch norms -> exit status and error lines."""
    flags = ("--num_epochs=5", "--batch_size=2", "--gradient_accumulation_steps=1", f"--data={EXAMPLE}")

    def command(name: str) -> tuple[int, list[str], str]:
        status, _, err = run(*AUTOENCODER.flags, *flags, f"--output_dir={tmp_path / name}")
        return status, [line for line in err.splitlines() if line.startswith("mflux-vae: error: ")], err

    return command


def test_the_same_command_continues_to_the_same_result(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("whole")[0] == 0
    expected = left(AUTOENCODER.folder(tmp_path / "whole"))
    out = AUTOENCODER.folder(tmp_path / "out")

    def measure(self: Validation) -> Any:
        raise RuntimeError(METAL)

    with monkeypatch.context() as patch:
        fail_update(patch, 7)
        status, lines, err = train("out")
    assert (status, len(lines)) == (1, 1) and "Traceback" not in err
    assert METAL[:-1] in lines[0] and lines[0].endswith("continues after update 6")
    assert "--allow_changes" in lines[0] and (out / "checkpoint-6").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", measure)
        status, lines, _ = train("out")
    assert status == 1 and lines[0].endswith("continues after update 8")
    assert train("out")[0] == 0
    same(out, expected)


@pytest.mark.parametrize(("text", "kind", "status"), [(METAL, "mac", 0), (CUDA, "cuda", 1)])
def test_a_preview_ends_a_run_on_cuda_only(
    text: str, kind: str, status: int, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(self: Validation, update: int) -> Any:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(device, "kind", lambda: kind)
        patch.setattr(Validation, "_draw", draw)
        found, lines, err = train("out")
    assert found == status and "--samples_every" in err and "Traceback" not in err
    assert not lines or lines[0].endswith("continues after update 4")
    assert (AUTOENCODER.folder(tmp_path / "out") / "checkpoint-10").is_dir() == (status == 0)


def test_images_that_are_not_finite_are_named(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Objective.per_sample

    def infinite(self: Any, reconstruction: mx.array, *rest: Any) -> Any:
        values, training = before(self, reconstruction, *rest), isinstance(rest[-1], mx.array)
        return values if training else {**values, "loss": values["loss"] * float("inf")}

    monkeypatch.setattr(Objective, "per_sample", infinite)
    monkeypatch.setattr(Validation, "_draw", lambda self, update: {})
    _, _, err = train("out")
    assert "held-out images with a loss that is not finite: 0" in err


class Stub:
    """A step of a network, or of a discriminator with its parameters."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.model, self.parameters = error, self, {"weight": mx.zeros(1)}

    def __call__(self, *_: Any) -> dict[str, float]:
        if self.error is not None:
            self.parameters = {}
            raise self.error
        return {"loss": 0.0, "grad_norm": 0.0}

    def trainable_parameters(self) -> Any:
        return self.parameters

    def update(self, parameters: Any) -> None:
        self.parameters = parameters


def test_a_network_one_update_ahead_of_its_discriminator_is_not_saved() -> None:
    adversarial: Any = AdversarialStep
    with pytest.raises(UpdateFailed):
        adversarial(Stub(), Stub(RuntimeError(CUDA)), 0)(0, [], 0.1)
    discriminator = Stub()
    with pytest.raises(DeviceError) as caught:
        adversarial(Stub(DeviceError("failed")), discriminator, 0)(0, [], 0.1)
    assert not isinstance(caught.value, UpdateFailed) and discriminator.parameters
