"""An error of MLX's device in an update or in a preview: one line, a checkpoint, and the same command continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.errors import DeviceError
from mflux_vae.runtime import device
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import cli
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.contracts.fake import FakePipeline
from tests.faults.runs import EXAMPLE, left, same
from tests.helpers.device_failure import CUDA, METAL, PASSES, REPLACING, fail_update

Make = Callable[..., DreamBoothSettings]


def train(settings: DreamBoothSettings) -> Any:
    return DreamBooth(FakePipeline()).train(settings)


def test_the_command_continues_from_the_update_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(name: str) -> int:
        flags = (
            *("--model=tiny", f"--instance_data_dir={EXAMPLE}", "--instance_prompt=a photo of xyz star"),
            *("--max_train_steps=4", "--rank=4", "--resolution=32", "--num_validation_images=0"),
            *("--gradient_accumulation_steps=1", "--prior_preservation=none"),
            f"--encodings_dir={tmp_path / 'encodings'}",
        )
        return cli.main([*flags, f"--output_dir={tmp_path / name}"])

    assert command("whole") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fail_update(patch, 3)
        assert command("out") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and METAL[:-1] in lines[0]
    assert "give --gradient_checkpointing, or change by --allow_changes --" in lines[0]
    assert lines[0].endswith("the same command continues after update 2")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert "ended by DeviceError: out of memory" in (tmp_path / "out" / "train.log").read_text()
    assert command("out") == 0
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_a_checkpoint_does_not_need_its_adapter_file(
    short_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise DeviceError("out of memory", memory=True)

    with monkeypatch.context() as patch, pytest.raises(DeviceError, match="continues after update 2"):
        patch.setattr(lora, "save_adapter", fails)
        fail_update(patch, 3)
        train(short_run(prior_preservation="none"))
    assert "no pytorch_lora_weights.safetensors" in caplog.text
    assert train(short_run(prior_preservation="none")).updates == 4


def test_full_weights_and_previews_continue(short_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"train_mode": "full", "max_train_steps": 10, "checkpointing_steps": 5}
    given |= {"num_validation_images": 1, "validation_steps": 6, "num_class_images": 2}
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    train(short_run(**given, output_dir=str(tmp_path / "whole")))
    for when, kept in ((PASSES, 6), (REPLACING, 5)):
        out = tmp_path / when
        with monkeypatch.context() as patch, pytest.raises(DeviceError, match=f"continues after update {kept}"):
            fail_update(patch, 7, CUDA, when=when)
            train(short_run(**given, output_dir=str(out)))
        assert train(short_run(**given, output_dir=str(out))).updates == 10 - kept
        same(out, left(tmp_path / "whole"))


@pytest.mark.parametrize("text", [METAL, CUDA])
def test_a_preview_ends_a_run_on_cuda_only(
    text: str, short_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"num_validation_images": 2, "validation_steps": 3, "prior_preservation": "none"}
    original, calls = FakePipeline.sample, 0

    def sample(self: FakePipeline, *arguments: Any, **named: Any) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first one is drawn before the first update
            raise RuntimeError(text)
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FakePipeline, "sample", sample)
        patch.setattr(device, "kind", lambda: "cuda" if text == CUDA else "mac")
        if text == METAL:
            train(short_run(**given))
            assert METAL in caplog.text and "; give --num_validation_images" in caplog.text
            assert [path.name for path in sorted((tmp_path / "out" / "samples").glob("step-*"))] == [
                "step-00000.png",
                "step-00006.png",
            ]
            return
        with pytest.raises(DeviceError, match="continues after update 3") as caught:
            train(short_run(**given))
    assert "--num_validation_images" in str(caught.value)
    train(short_run(**given))
    train(short_run(**given, output_dir=str(tmp_path / "whole")))
    same(tmp_path / "out", left(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["encode_prompts", "encode_images", "sample"])
def test_before_the_first_update_the_message_has_the_flags(
    method: str, short_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(FakePipeline, method, fails)
    with pytest.raises(DeviceError) as caught:
        train(short_run(train_batch_size=2, num_class_images=1))
    message = str(caught.value)
    assert (
        message.startswith("out of memory (MemoryError); give --train_batch_size 1 ") and "--resolution 12" in message
    )
    assert "--allow_changes" not in message
