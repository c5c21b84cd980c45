"""Runs that are killed, interrupted or out of disk space resume to the same files, bit for bit."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.images import save_image
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.dreambooth import train as train_module
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.training.hooks import read_metrics
from mflux_vae_train.training.step import Step
from tests.contracts.fake import FakePipeline
from tests.faults.runs import left, same
from tests.helpers.crash_copies import states
from tests.mflux_vae_train.pipelines.flux1.small_flux import small_pipeline

Make = Callable[..., DreamBoothSettings]


@pytest.fixture
def settings(instance_dir: Path, tmp_path: Path) -> Make:
    """Accumulation of four, prior preservation, dropouts, previews, checkpoints."""
    given: dict[str, Any] = {
        "model": "fake",
        "instance_data_dir": str(instance_dir),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "out"),
        "max_train_steps": 5,
        "lr_warmup_steps": 1,
        "num_class_images": 3,
        "num_validation_images": 1,
        "gradient_accumulation_steps": 4,
        "exact_micro_batches": True,
        "lora_dropout": 0.2,
        "caption_dropout": 0.3,
        "validation_steps": 2,
        "checkpointing_steps": 2,
    }
    return lambda **changes: DreamBoothSettings(**{**given, **changes})


def train(settings: DreamBoothSettings, pipeline: Any = None) -> Any:
    return DreamBooth(pipeline or FakePipeline()).train(settings)


@contextmanager
def signalled(call: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Send a signal to this process at the n-th micro-batch."""
    calls = 0
    original = Step._differentiate

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # lets Python call the signal handler
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(Step, "_differentiate", counted)
        yield
    assert caught.value.exit_code == 128 + number


# killed


def test_a_run_killed_before_any_file_operation_resumes_to_the_same_result(settings: Make, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    taken = states(out, tmp_path / "states", lambda: train(settings()), every=29)
    expected = left(Path(shutil.move(out, whole)))
    assert len(taken) > 4 and {"checkpoint-4/state.json", "samples/progress.png"} <= expected.keys()
    for state in taken:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(state, out)
        train(settings())
        same(out, expected)


def test_a_missed_preview_is_made_later(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    original = FakePipeline.sample
    train(settings(output_dir=str(tmp_path / "whole")))

    def dies(self: FakePipeline, *arguments: Any, **named: Any) -> mx.array:
        if (tmp_path / "out" / "checkpoint-2").exists():
            raise Killed
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FakePipeline, "sample", dies)
        train(settings())
    assert not (tmp_path / "out" / "samples" / "step-00002.png").exists()
    train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))


# within an update, in all training modes


@contextmanager
def crash(micro_batch: int) -> Iterator[None]:
    """Kill the process within the n-th micro-batch."""

    class Killed(BaseException):
        pass

    calls, original = 0, Step._differentiate

    def dies(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == micro_batch:
            raise Killed
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Step, "_differentiate", dies)
        yield


COMBINATIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw in 8 bits": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "dora, restarts": {"use_dora": True, "lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
    "buckets, flips, crops": {"use_aspect_ratio_buckets": True, "random_flip": True, "train_batch_size": 2},
    "crops, no pictures of the class": {"center_crop": False, "prior_preservation": "dop"},
    "all weights, epochs": {"train_mode": "full", "lora_dropout": 0.0, "num_train_epochs": 4},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_resuming_within_an_update(name: str, settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    if "buckets" in name:
        save_image(instance_dir / "wide.png", np.full((16, 48, 3), 90, np.uint8))
    train(settings(output_dir=str(tmp_path / "whole"), **COMBINATIONS[name]))
    with crash(4 * 3 + 2):
        train(settings(**COMBINATIONS[name]))
    assert checkpoint.latest(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    train(settings(**COMBINATIONS[name]))
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_resuming_within_an_update_with_quantized_weights(settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    """Prior preservation, caption and adapter dropout, buckets and Prodigy on an 8-bit model."""
    changes: dict[str, Any] = {"quantize": 8, "resolution": 32, "num_class_images": 1, "max_train_steps": 3}
    changes |= {"optimizer": "prodigy", "learning_rate": 1.0, "use_aspect_ratio_buckets": True, "random_flip": True}
    save_image(instance_dir / "wide.png", np.full((32, 64, 3), 90, np.uint8))

    def pipeline(name: str) -> Any:
        return small_pipeline(tmp_path / name)

    train(settings(output_dir=str(tmp_path / "whole"), **changes), pipeline("one"))
    with crash(4 * 2 + 2):
        train(settings(**changes), pipeline("two"))
    train(settings(**changes), pipeline("three"))
    same(tmp_path / "out", left(tmp_path / "whole"))


# signals


@pytest.mark.parametrize(("call", "number"), [(1, signal.SIGTERM), (6, signal.SIGINT), (8, signal.SIGTERM), (20, 2)])
def test_a_signal_within_an_update_saves_after_it(settings: Make, tmp_path: Path, call: int, number: int) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    done = -(-call // 4)  # four micro-batches make an update
    with signalled(call, number):
        train(settings())
    assert checkpoint.latest(tmp_path / "out") == tmp_path / "out" / f"checkpoint-{done}"
    assert train(settings()).updates == 5 - done
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_repeated_signals(settings: Make, tmp_path: Path) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    for done in range(1, 6):
        with signalled(2):
            train(settings())
        assert checkpoint.latest(tmp_path / "out") == tmp_path / "out" / f"checkpoint-{done}"
    train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))


# concurrent runs


def test_a_second_run_into_the_same_folder_is_refused(settings: Make, tmp_path: Path) -> None:
    out, messages = tmp_path / "out", []

    class Meanwhile(FakePipeline):
        def encode_images(self, pixels: mx.array) -> mx.array:
            with pytest.raises(SettingsError) as caught:
                train(settings())
            messages.append(str(caught.value))
            return super().encode_images(pixels)

    train(settings(), Meanwhile())
    assert messages and all(f"{out}: another process" in text for text in messages)
    assert train(settings()).updates == 0  # the lock is released


def test_one_of_many_concurrent_runs_trains(settings: Make, tmp_path: Path) -> None:
    outcomes: list[Any] = []

    def one() -> None:
        try:
            outcomes.append(train(settings()).updates)
        except SettingsError:
            outcomes.append("refused")

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(5) == 1 and set(outcomes) <= {5, 0, "refused"}
    train(settings(output_dir=str(tmp_path / "whole")))
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_trains_without_file_locks(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert train(settings()).updates == 5


# disks, clocks


def test_a_full_disk_loses_only_updates_since_the_last_checkpoint(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    original = mx.save_safetensors

    def full(file: str, arrays: dict[str, mx.array], *rest: Any) -> None:
        original(file, arrays, *rest)
        if "checkpoint-4" in file:
            os.truncate(file, 100)
            raise RuntimeError("[write] Unable to write 8 bytes to file.")

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingError, match="checkpoint-4: cannot be written") as caught,
    ):
        patch.setattr(mx, "save_safetensors", full)
        train(settings())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-2"]
    assert train(settings()).updates == 3
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_a_full_disk_during_class_images(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "class-00001.png":
            raise OSError(28, "No space left on device", str(target))
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="No space left"):
        patch.setattr("mflux_vae.images.os.replace", full)
        train(settings())
    assert [path.name for path in (tmp_path / "out" / "class_images").iterdir()] == ["class-00000.png"]
    assert "No space left" in (tmp_path / "out" / "train.log").read_text()
    train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_a_full_disk_during_encoding(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    kept, original = 0, os.replace

    def full(source: Path, target: Path) -> None:
        nonlocal kept
        target = Path(target)
        kept += target.parent.name == "encodings" and not target.name.startswith(".")
        if kept == 3:
            raise OSError(28, "No space left on device", str(target))
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="No space left"):
        patch.setattr(os, "replace", full)
        train(settings())
    encodings = tmp_path / "out" / "encodings"
    assert len(list(encodings.iterdir())) == 2 and not list(encodings.glob(".*"))
    train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(FakePipeline):
        def encode_images(self, pixels: mx.array) -> mx.array:
            (handler,) = (
                h for h in logging.getLogger("mflux_vae_train").handlers if isinstance(h, logging.FileHandler)
            )
            handler.stream.close()
            handler.stream = open("/dev/full", "w") if os.path.exists("/dev/full") else open(os.devnull)  # noqa: SIM115
            return super().encode_images(pixels)

    assert train(settings(), Full()).updates == 5
    assert "Traceback" not in capsys.readouterr().err


def test_a_clock_that_goes_backwards(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    with signalled(8):
        train(settings())
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    for path in (tmp_path / "out" / "checkpoint-2").iterdir():
        os.utime(path, (4e9, 4e9))
    train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))


# changes between runs


def test_images_deleted_during_a_run_matter_only_afterwards(
    settings: Make, tmp_path: Path, instance_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(output_dir=str(tmp_path / "whole")))
    kept = (instance_dir / "picture-1.png").read_bytes()

    second, original = (instance_dir / "picture-2.png").read_bytes(), train_module.dreambooth_loss

    def losing(*arguments: Any, **named: Any) -> Any:
        (instance_dir / "picture-1.png").unlink(missing_ok=True)
        save_image(instance_dir / "picture-2.png", np.zeros((16, 16, 3), np.uint8))
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "dreambooth_loss", losing)
        train(settings())
    same(tmp_path / "out", left(tmp_path / "whole"))
    with pytest.raises(SettingsError, match="instance pictures was"):
        train(settings(max_train_steps=5))
    (instance_dir / "picture-1.png").write_bytes(kept)
    (instance_dir / "picture-2.png").write_bytes(second)
    assert train(settings()).updates == 0


def test_another_model_is_refused_but_another_name_is_not(settings: Make, tmp_path: Path) -> None:
    with signalled(8):
        train(settings())
    with pytest.raises(SettingsError, match=r"base weights changed\)"):
        train(settings(), FakePipeline(seed=1))
    elsewhere = FakePipeline()
    elsewhere.name = "a copy"
    train(settings(model="elsewhere"), elsewhere)
    train(settings(output_dir=str(tmp_path / "whole")))
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_allow_changes_continues_and_warns(settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with signalled(8):
        train(settings())
    changed = {"learning_rate": 1e-3, "max_train_steps": 7}
    with pytest.raises(SettingsError, match=r"max_train_steps was 5, is now 7.*--allow_changes"):
        train(settings(**changed))
    assert train(settings(allow_changes=True, **changed)).updates == 5
    assert "learning_rate was 0.02, is now 0.001" in caplog.text
    metrics = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [line["update"] for line in metrics] == [*range(1, 8)] and metrics[2]["learning_rate"] < 1e-3
    assert train(settings(**changed)).updates == 0  # the folder holds the changed run
    with pytest.raises(TrainingError, match="cannot be restored"):
        train(settings(allow_changes=True, rank=3, **changed))
    with pytest.raises(SettingsError, match="ends after 3"):
        train(settings(allow_changes=True, max_train_steps=3))


def test_a_checkpoint_replaces_a_lost_run_file(settings: Make, tmp_path: Path) -> None:
    with signalled(8):
        train(settings())
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(SettingsError, match=r"no run\.json"):
        train(settings(learning_rate=1e-3))
    train(settings())
    train(settings(output_dir=str(tmp_path / "whole")))
    same(tmp_path / "out", left(tmp_path / "whole"))
