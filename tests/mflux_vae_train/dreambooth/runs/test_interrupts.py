"""A signal ends long work at once. The resumed run does it again and gives the same result."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.contracts.fake import FakePipeline
from tests.faults.runs import intact, left, same
from tests.helpers.signals import LONG, SOON, signalled_within

ROOT = Path(__file__).parents[4]

GIVEN: dict[str, Any] = {
    "model": "fake",
    "instance_prompt": "a photo of sks dog",
    "max_train_steps": 4,
    "lr_warmup_steps": 1,
    "num_class_images": 3,
    "sample_batch_size": 1,
    "num_validation_images": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "validation_steps": 2,
    "checkpointing_steps": 3,
}

Train = Callable[[str], Any]


@pytest.fixture
def train(instance_dir: Path, tmp_path: Path) -> Train:
    """Settings of a run into a folder of this name."""

    def run(name: str) -> Any:
        settings = {**GIVEN, "instance_data_dir": str(instance_dir), "output_dir": str(tmp_path / name)}
        return DreamBooth(FakePipeline()).train(DreamBoothSettings(**settings))

    return run


# FakePipeline samples three class images one by one, then the previews of updates 0, 2 and 4, each at once.
MOMENTS = {
    "prompts": ("encode_prompts", 1, None),
    "the second class picture": ("sample", 2, None),
    "latents": ("encode_images", 1, None),
    "the first preview": ("sample", 4, None),
    "a preview": ("sample", 5, 2),
    "the last preview": ("sample", 6, 4),
}
"""Method, number of its call, and update of the checkpoint."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_work_is_done_after_resuming(moment: str, number: int, train: Train, tmp_path: Path) -> None:
    out, (method, call, update) = tmp_path / "out", MOMENTS[moment]
    train("whole")
    with signalled_within(FakePipeline, method, call, number):
        train("out")
    intact(out)
    assert checkpoint.latest(out) == (None if update is None else out / f"checkpoint-{update}")
    assert not (out / f"samples/step-{update or 0:05}.png").exists()
    if moment == "the second class picture":
        assert [path.name for path in (out / "class_images").iterdir()] == ["class-00000.png"]
    assert "interrupted by" in (out / "train.log").read_text()
    assert train("out").updates == 4 - (update or 0)
    same(out, left(tmp_path / "whole"))


def test_repeated_signals_in_one_preview(train: Train, tmp_path: Path) -> None:
    train("whole")
    for call in (5, 1, 1):
        with signalled_within(FakePipeline, "sample", call, signal.SIGTERM):
            train("out")
    train("out")
    same(tmp_path / "out", left(tmp_path / "whole"))


def test_a_signal_at_the_end_of_the_run(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("whole")
    module = sys.modules[DreamBooth.__module__]
    with signalled_within(module, "write_model_card", 1, signal.SIGINT):
        train("out")
    assert train("out").updates == 0
    same(tmp_path / "out", left(tmp_path / "whole"))


# as a command in another process

HELD = """
import sys, time
from pathlib import Path
from mflux_vae_train.dreambooth import cli
from mflux_vae_train.dreambooth import train as module
from mflux_vae_train.pipelines import registry
from tests.contracts.fake import FakePipeline
where, marker = sys.argv.pop(1), Path(sys.argv.pop(1))
def held(*_, **__):
    marker.touch()
    time.sleep({LONG})
if where == "update":
    module.dreambooth_loss = held
else:
    FakePipeline.sample = held
registry.open_pipeline = lambda *_, **__: FakePipeline()
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("where", "sent", "status"),
    [
        ("picture", [signal.SIGTERM], 143),
        ("picture", [signal.SIGINT], 130),
        ("update", [signal.SIGINT, signal.SIGINT], -signal.SIGINT),
    ],
)
def test_the_exit_status_is_that_of_the_signal(
    where: str, sent: list[int], status: int, instance_dir: Path, tmp_path: Path
) -> None:
    """The first signal waits for the end of the update; the second ends it at once."""
    flags = [f"--{name}={value}" for name, value in GIVEN.items()]
    flags += [f"--instance_data_dir={instance_dir}", f"--output_dir={tmp_path / 'out'}"]
    if where == "update":
        flags += ["--prior_preservation=none", "--num_validation_images=0"]
    output, marker = tmp_path / "output", tmp_path / "marker"
    code = HELD.replace("{LONG}", str(LONG))
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, where, str(marker), *flags], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        _wait(marker.exists)
        for number in sent[:-1]:
            process.send_signal(number)
            _wait(lambda: "again to stop at once" in output.read_text())
        process.send_signal(sent[-1])
        assert process.wait(SOON) == status
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in output.read_text()
    assert (f"interrupted by {signal.Signals(sent[0]).name}; finished work is kept" in output.read_text()) == (
        where == "picture"
    )


def _wait(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)
