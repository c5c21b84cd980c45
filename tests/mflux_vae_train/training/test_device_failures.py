"""After an error of MLX's device the last whole update is saved, and the continued run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.errors import DeviceError
from mflux_vae.runtime import device
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.training.hooks import every
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import Step
from tests.helpers.device_failure import CUDA, METAL, PASSES, REPLACING, fail_update
from tests.mflux_vae_train.training.test_loop import Run
from tests.mflux_vae_train.training.tiny_model import Net, loss, window


class Continuing(Run):
    """With the hooks that are still to be called."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder, kind)
        self.pending = PendingHooks()
        self.objects["pending_hooks"] = self.pending.stateful()

    def train(self, start: int, hooks: list[Any]) -> None:
        def rate(update: int) -> float:
            return 0.01 / (update + 1)

        options: dict[str, Any] = {"checkpoint": self.save, "pending": self.pending}
        fit(step=self.step, batches=window, learning_rate=rate, total=8, start=start, hooks=hooks, **options)


def equal(one: Run, other: Run) -> bool:
    found, expected = (
        {path: array for path, array in run.everything().items() if isinstance(array, mx.array)} for run in (one, other)
    )
    return found.keys() == expected.keys() and all(mx.array_equal(found[path], expected[path]) for path in expected)


@pytest.mark.parametrize(("text", "kind_of_device"), [(METAL, "mac"), (CUDA, "cuda")])
@pytest.mark.parametrize(
    ("kind", "when", "kept"),
    [
        ("lora", PASSES, 6),
        ("lora", REPLACING, 6),
        ("full", PASSES, 6),
        ("muon", PASSES, 6),
        ("full", REPLACING, 4),  # the state is lost: the last checkpoint on disk
    ],
)
def test_the_last_whole_update_is_saved(
    kind: str, when: str, kept: int, text: str, kind_of_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "kind", lambda: kind_of_device)
    whole = Continuing(tmp_path / "whole", kind)
    whole.train(0, [])

    first = Continuing(tmp_path / "parts", kind)
    first.step._holds_state = kind == "lora"  # the adapter of so small a network is not small
    with monkeypatch.context() as patch, pytest.raises(DeviceError) as caught:
        fail_update(patch, 7, text, when=when)
        first.train(0, [every(4, lambda record: first.save(record.update), last=False)])
    assert text[:-1] in str(caught.value) and str(caught.value).endswith(f"continues after update {kept}")

    second = Continuing(tmp_path / "parts", kind)
    folder = checkpoint.latest(tmp_path / "parts")
    assert folder is not None and checkpoint.load(folder, second.objects, fingerprint={"seed": 0}) == kept
    second.train(kept, [])
    assert equal(second, whole)


def test_a_hook_that_failed_is_called_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails(record: Any) -> None:
        calls.append(record.update)
        if len(calls) == 3:
            raise RuntimeError(METAL)

    first = Continuing(tmp_path, "full")
    with pytest.raises(DeviceError, match="continues after update 3"):
        first.train(0, [fails])
    second = Continuing(tmp_path, "full")
    second.train(checkpoint.load(tmp_path / "checkpoint-3", second.objects, fingerprint={"seed": 0}), [fails])
    assert calls == [1, 2, 3, 3, 4, 5, 6, 7, 8]


def test_what_is_saved_is_not_promised_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(DeviceError, match="no update is saved"):
        fail_update(patch, 1)
        Continuing(tmp_path / "first", "full").train(0, [])
    assert not (tmp_path / "first").exists()

    run = Continuing(tmp_path / "full", "full")
    original = mx.save_safetensors

    def full(file: str, *rest: Any) -> None:
        if "checkpoint-6" in file:
            raise RuntimeError("[write] Unable to write 8 bytes to file.")
        original(file, *rest)

    with monkeypatch.context() as patch, pytest.raises(DeviceError) as caught:
        patch.setattr(mx, "save_safetensors", full)
        fail_update(patch, 7)
        run.train(0, [every(4, lambda record: run.save(record.update), last=False)])
    message = str(caught.value)
    assert "update 6 could not be saved" in message and message.endswith("continues after update 4")


def test_only_small_adapters_hold_their_state() -> None:
    net = Net()
    assert not Step(net, AdamW(), loss)._holds_state
    net.freeze()
    net.out.unfreeze()
    assert Step(net, AdamW(), loss)._holds_state
