"""Access tokens reach no log, no file and no message; offline, nobody is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import VAE
from mflux_vae.errors import MfluxVaeError, SettingsError, WeightsError
from mflux_vae.images import save_image
from mflux_vae.pretrained import hub
from mflux_vae.utils.console import logging_to_console
from mflux_vae.utils.redaction import HIDDEN, redacted
from mflux_vae_train.dreambooth import run_folder
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines.registry import open_pipeline
from tests.conftest import Run
from tests.contracts.fake import FakePipeline
from tests.fuzzing.mutations import Target, watched

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for https://user:{TOKEN}@huggingface.co/a/b",
        f"https://huggingface.co/a/b?token={TOKEN}&x=1",
        f"Authorization: Bearer {TOKEN}",
        f"token {TOKEN} is not valid",
        "https://me:pass@word.example/a",
        "the password is environ-secret-1",
    ],
)
def test_what_looks_like_a_token_is_left_out(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "environ-secret-1")
    cleaned = redacted(text)
    assert HIDDEN in cleaned
    assert not any(secret in cleaned for secret in (TOKEN, "me:pass", "environ-secret-1"))
    assert str(MfluxVaeError(text)) == str(WeightsError(text)) == cleaned


def test_other_text_stays_as_it_is() -> None:
    for text in ("a photo of sks dog", "black-forest-labs/FLUX.1-dev", "https://huggingface.co/a", "hf_x", "a@b.c", ""):
        assert redacted(text) == text


def test_no_setting_may_hold_one(tmp_path: Path) -> None:
    given = {"instance_data_dir": "a", "instance_prompt": "b", "output_dir": str(tmp_path / "out")}
    with pytest.raises(SettingsError, match="--model") as caught:
        DreamBoothSettings(model=f"https://user:{TOKEN}@huggingface.co/a/b", **given)  # type: ignore[arg-type]
    assert TOKEN not in str(caught.value)


def test_a_whole_run_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    save_image(tmp_path / "pictures" / "a.png", np.zeros((64, 64, 3), np.uint8))

    class Telling(FakePipeline):
        """Says it among what it does, and fails to draw previews, saying it again."""

        def encode_images(self, pixels: mx.array) -> mx.array:
            logging.getLogger("mflux_vae_train.anywhere").warning("used %s", TOKEN)
            return super().encode_images(pixels)

        def sample(self, *_: object, **__: object) -> mx.array:
            raise RuntimeError(f"GET https://x:{TOKEN}@huggingface.co failed")

    given: dict[str, Any] = {"instance_data_dir": str(tmp_path / "pictures"), "instance_prompt": "a photo of xyz"}
    given |= {"max_train_steps": 2, "lr_warmup_steps": 1, "prior_preservation": "none"}
    with logging_to_console({"mflux_vae_train": logging.INFO}):
        DreamBooth(Telling()).train(DreamBoothSettings(model="fake", output_dir=str(tmp_path / "out"), **given))
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"settings.yaml", "run.json", "report.html", "README.md", "metrics.jsonl", "checkpoint-2"} <= made
    assert HIDDEN in (tmp_path / "out" / "train.log").read_text()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    out, err = capsys.readouterr()
    assert TOKEN not in out + err and HIDDEN in err


def test_the_run_log_leaves_out_what_a_traceback_says(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_folder.log_to_file(tmp_path / "train.log"):
        raise RuntimeError(f"GET https://x:{TOKEN}@huggingface.co failed")
    assert HIDDEN in (text := (tmp_path / "train.log").read_text()) and TOKEN not in text


def test_a_command_line_says_none(run: Run) -> None:
    status, out, err = run("info", f"https://user:{TOKEN}@huggingface.co/a/b")
    assert status == 2 and TOKEN not in out + err


def hub_errors() -> list[Exception]:
    """What the hub's client lets through, and what a broken answer of the hub makes of it."""
    errors = huggingface_hub.errors
    found: list[Exception] = [
        OSError(f"429 for https://x:{TOKEN}@huggingface.co"),
        ValueError("Expecting value: line 1\ncolumn 1"),
        KeyError("siblings"),
        TypeError("'NoneType' object is not iterable"),
        RecursionError(),
        TimeoutError(),
        errors.OfflineModeIsEnabled("offline"),
        errors.LocalEntryNotFoundError("not there"),
        errors.HFValidationError("no name"),
    ]
    return found


@pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
def test_any_answer_of_the_hub_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answers)
    with pytest.raises(WeightsError) as caught:
        hub.fetch("owner/name")
    assert "owner/name" in str(caught.value) and "\n" not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize("files", [{}, {"config.json": "[]"}, {"vae/config.json": "{"}])
def test_a_snapshot_that_lacks_what_it_should_have(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(WeightsError):
        hub.fetch("owner/name")


@pytest.mark.parametrize("ask", [hub.fetch, VAE.from_pretrained, open_pipeline])
def test_offline_nobody_is_asked(ask: Callable[[str], object], hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asking = Target("unused", [b""], lambda _: ask("owner/name"))
    watched(asking, b"", hub_home)
    with pytest.raises(WeightsError, match="cannot be reached"):
        asking(b"", hub_home, good=True)
