"""The folder of a run: what is refused changes nothing, going back sticks, and refusals name what differs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import MfluxVaeError, SettingsError, WeightsError
from mflux_vae.images import save_image
from mflux_vae.weights.formats.files import header
from mflux_vae_train.dreambooth import train as train_module
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.training.hooks import read_metrics
from tests.contracts.fake import FakePipeline

Make = Callable[..., DreamBoothSettings]
LIMIT = 300
"""Characters of a readable message, without paths of the test."""


class Stop(BaseException):
    pass


@pytest.fixture
def settings(short_run: Make) -> Make:
    """Eight updates with a checkpoint every two, without class images."""
    given = {"max_train_steps": 8, "gradient_accumulation_steps": 1, "prior_preservation": "none"}
    given |= {"checkpointing_steps": 2, "checkpoints_total_limit": None}
    return lambda **changes: short_run(**{**given, **changes})


@contextmanager
def stopped_after(updates: int) -> Iterator[None]:
    """Kill the run after this many updates."""
    step = train_module.Step.__call__

    def dies(self: Any, update: int, *rest: Any) -> Any:
        if update == updates:
            raise Stop
        return step(self, update, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_module.Step, "__call__", dies)
        yield


def train(settings: DreamBoothSettings, pipeline: Any = None) -> Any:
    return DreamBooth(pipeline or FakePipeline()).train(settings)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(settings: DreamBoothSettings, *words: str, out: Path) -> str:
    """The command is refused with these words, before anything is encoded, and the folder stays as it is."""
    before, pipeline = content(out), FakePipeline()
    with pytest.raises(MfluxVaeError) as caught:
        train(settings, pipeline)
    message = str(caught.value).replace(str(out.parent), "")
    assert all(word in message for word in words) and len(message) <= LIMIT, message
    assert content(out) == before
    assert pipeline.images_encoded == pipeline.images_sampled == 0 and not pipeline.prompts_encoded
    return message


# refusals


REFUSALS: list[tuple[dict[str, Any], list[str]]] = [
    ({"rank": 4}, ["rank was 2, is now 4"]),
    ({"rank": 4, "max_train_steps": 12, "allow_changes": True}, ["lora_a"]),
    ({"use_dora": True, "max_train_steps": 12, "allow_changes": True}, ["/m"]),
    ({"lora_layers": "proj_in,to_out,proj_out", "max_train_steps": 12, "allow_changes": True}, ["proj_out"]),
    ({"optimizer": "lion", "max_train_steps": 12, "allow_changes": True}, ["optimizer was 'adamw'"]),
    ({"train_mode": "full", "max_train_steps": 12, "allow_changes": True}, ["train_mode"]),
    ({"max_train_steps": 6, "allow_changes": True}, ["ends after 6"]),
    ({"learning_rate": 0.5, "allow_changes": True}, ["nothing is left", "--max_train_steps"]),
    ({"max_train_steps": 12}, ["--lora_weights", "--output_dir NEW", "--allow_changes", "warm restart"]),
    ({"resume_from_checkpoint": "checkpoint-5"}, ["checkpoint-8, checkpoint-6, checkpoint-4, checkpoint-2"]),
    ({"resume_from_checkpoint": "checkpoint-4", "learning_rate": 0.5}, ["learning_rate"]),
    ({"seed": 3, "lora_dropout": 0.25, "lr_scheduler": "linear", "num_crops": 7, "random_flip": True}, ["seed was 0"]),
    ({"instance_prompt": "a photo of sks dog " + "in the rain " * 50}, ["instance_prompt"]),
]


def test_a_refused_command_changes_nothing(settings: Make, tmp_path: Path) -> None:
    train(settings())
    for changes, words in REFUSALS:
        refused(settings(**changes), *words, out=tmp_path / "out")
        refused(settings(**changes, dry_run=True), *words, out=tmp_path / "out")
    assert train(settings()).updates == 0


def test_a_refused_checkpoint_of_another_folder_changes_nothing(settings: Make, tmp_path: Path) -> None:
    train(settings(output_dir=str(tmp_path / "other"), rank=3))
    (tmp_path / "out").mkdir()
    refused(settings(resume_from_checkpoint=str(tmp_path / "other")), "rank was 3, is now 2", out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(settings(resume_from_checkpoint=str(tmp_path / "empty")), "empty", out=tmp_path / "out")


# files that differ


def test_the_file_that_differs_is_named(settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    out, captioned = tmp_path / "out", instance_dir / "picture-3.txt"
    captioned.write_text("sks dog asleep")
    train(settings())

    def named(*words: str) -> None:
        refused(settings(), "instance pictures", *words, out=out)

    captioned.write_text("sks dog awake")
    named("caption of picture-3.png was 'sks dog asleep', is now 'sks dog awake'")
    captioned.write_text("sks dog asleep")
    save_image(instance_dir / "picture-7.png", np.zeros((16, 16, 3), np.uint8))
    named("picture-7.png is new")
    (instance_dir / "picture-7.png").unlink()
    kept = (instance_dir / "picture-1.png").read_bytes()
    save_image(instance_dir / "picture-1.png", np.zeros((16, 16, 3), np.uint8))
    named("picture-1.png has other content")
    (instance_dir / "picture-1.png").write_bytes(kept)
    (instance_dir / "picture-0.png").rename(instance_dir / "z.png")
    named("order", "picture-0.png is now called z.png")
    (instance_dir / "z.png").rename(instance_dir / "picture-0.png")
    for number in range(20, 60):
        save_image(instance_dir / f"picture-{number}.png", np.full((16, 16, 3), number, np.uint8))
    named("picture-20.png is new", "more")


def test_other_class_images_are_named_although_the_run_is_finished(settings: Make, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "dogs"
    for number in range(2):
        save_image(folder / f"dog-{number}.png", np.full((16, 16, 3), 60 * number, np.uint8))
    changes: dict[str, Any] = {"prior_preservation": "class_images", "num_class_images": 3}
    changes |= {"class_data_dir": str(folder), "max_train_steps": 2}
    train(settings(**changes))
    generated = folder / "class-00000.png"
    kept = generated.read_bytes()
    generated.unlink()
    assert train(settings(**changes)).updates == 0  # it would be generated again
    generated.write_bytes(kept)
    (folder / "dog-1.png").unlink()
    refused(settings(**changes), "class pictures", "dog-1.png is gone", out=out)
    save_image(folder / "dog-1.png", np.full((16, 16, 3), 200, np.uint8))
    refused(settings(**changes), "class pictures", "dog-1.png has other content", out=out)


def test_a_resume_is_refused_before_class_images_are_drawn(settings: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"prior_preservation": "class_images", "num_class_images": 2, "max_train_steps": 2}
    train(settings(**changes))
    shutil.rmtree(tmp_path / "out" / "class_images")
    more = {**changes, "max_train_steps": 4, "allow_changes": True}
    refused(settings(**more, rank=4), "rank was 2, is now 4", out=tmp_path / "out")
    assert train(settings(**more)).updates == 2


# going back


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize("again", ["checkpoint-4", None, "latest"])
def test_going_back_sticks(settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, again: str | None) -> None:
    out = tmp_path / "out"
    changes: dict[str, Any] = {"learning_rate": 0.5, "num_validation_images": 1, "validation_steps": 2}
    train(settings(num_validation_images=1, validation_steps=2))
    back = settings(resume_from_checkpoint="checkpoint-4", allow_changes=True, **changes)
    with stopped_after(6):
        train(back)
    assert "checkpoint-8, checkpoint-6" in caplog.text and "abandoned" in caplog.text
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert names(out / "abandoned") == {"checkpoint-6", "checkpoint-8"}
    assert [line["update"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not (out / "samples" / "step-00008.png").exists() and (out / "samples" / "step-00006.png").exists()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        result = train(settings(resume_from_checkpoint=again, allow_changes=True, **changes))
    assert result.updates == 2 and "continuing after update 6" in caplog.text
    rates = [line["learning_rate"] for line in read_metrics(out / "metrics.jsonl")]
    assert rates[3] < 0.02 < min(rates[4:7]) and len(rates) == 8
    assert json.loads((out / "run.json").read_text())["branch"]["update"] == 4
    assert train(settings(resume_from_checkpoint=again, allow_changes=True, **changes)).updates == 0


def test_going_back_sticks_before_the_first_checkpoint_of_the_branch(settings: Make, tmp_path: Path) -> None:
    train(settings())
    changes = {"learning_rate": 0.5, "allow_changes": True}
    with stopped_after(5):
        train(settings(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"), **changes))
    assert train(settings(**changes)).updates == 4


def test_going_back_to_an_abandoned_checkpoint(settings: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings())
    whole = (out / "pytorch_lora_weights.safetensors").read_bytes()
    train(settings(resume_from_checkpoint="checkpoint-4", learning_rate=0.5, allow_changes=True))
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() != whole
    refused(settings(resume_from_checkpoint="checkpoint-1"), "learning_rate", out=out)
    assert train(settings(resume_from_checkpoint="abandoned/checkpoint-6", allow_changes=True)).updates == 2
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() == whole


def test_a_branch_whose_origin_is_elsewhere(settings: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(settings(output_dir=str(other), max_train_steps=8))
    shutil.rmtree(other / "checkpoint-8")
    began = settings(resume_from_checkpoint=str(other))  # the folder of a run: its newest checkpoint
    with stopped_after(7):
        train(began)
    assert train(settings()).updates == 2
    assert train(began).updates == 0


# changes that make no other run


@pytest.mark.parametrize(
    "changes",
    [
        {"num_validation_images": 2, "validation_prompt": ("a sks dog",), "validation_steps": 3},
        {"validation_epochs": 2},
        {"report_to": "none", "logging_dir": "elsewhere"},
        {"checkpointing_steps": 3, "checkpoints_total_limit": 1},
        {"sample_batch_size": 2, "gradient_checkpointing": False, "encodings_dir": "elsewhere"},
        {"lr_power": 2.0, "num_crops": 7, "prodigy_decouple": False, "logit_mean": 0.5, "num_class_images": 3},
    ],
)
def test_flags_that_shape_no_result_make_no_other_run(settings: Make, changes: Any) -> None:
    train(settings(max_train_steps=2))
    assert train(settings(max_train_steps=2, **changes)).updates == 0


def test_a_run_that_failed_before_any_update_does_not_block_its_folder(settings: Make, tmp_path: Path) -> None:
    class Broken(FakePipeline):
        def encode_images(self, pixels: mx.array) -> mx.array:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        train(settings(), Broken())
    with stopped_after(0):
        train(settings())
    assert train(settings(rank=3, max_train_steps=2)).updates == 2


def test_a_dry_run_of_a_finished_run_says_so(settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    train(settings(max_train_steps=2))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(settings(max_train_steps=2, dry_run=True))
    assert "already complete" in caplog.text and "updates of" not in caplog.text


# a longer run


def test_a_longer_schedule_that_jumps_or_ends_is_announced(settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    train(settings(lr_scheduler="cosine"))
    caplog.clear()
    train(settings(lr_scheduler="cosine", max_train_steps=16, allow_changes=True))
    assert "jumps from" in caplog.text and "change little" not in caplog.text
    caplog.clear()
    train(settings(lr_scheduler="cosine", max_train_steps=18, allow_changes=True, dry_run=True))
    assert "change little" in caplog.text and "--lora_weights" in caplog.text


def test_a_requested_file_is_added_to_a_finished_run(
    settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.mflux_vae_train.pipelines.flux1.small_flux import small_pipeline

    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"max_train_steps": 1, "resolution": 32}
    train(settings(**options), small_pipeline(tmp_path / "one"))
    adapter = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    before = adapter.read_bytes()
    assert train(settings(output_kohya_format=True, **options), small_pipeline(tmp_path / "two")).updates == 0
    assert (tmp_path / "out" / "pytorch_lora_weights_kohya.safetensors").is_file()
    assert adapter.read_bytes() == before
    assert "estimated peak memory" in caplog.text
    caplog.clear()
    train(settings(output_kohya_format=True, **options), small_pipeline(tmp_path / "three"))
    assert "already complete" in caplog.text and "estimated" not in caplog.text
    (tmp_path / "out" / "pytorch_lora_weights_kohya.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    train(settings(output_kohya_format=True, **options), small_pipeline(tmp_path / "four"))
    assert "kohya.safetensors cannot be added" in caplog.text


# an adapter to start from


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_starts_from_the_adapter_of_a_checkpoint(settings: Make, tmp_path: Path, dora: bool) -> None:
    out, options = tmp_path / "out", {"max_train_steps": 4, "rank": 3, "lora_alpha": 6.0, "use_dora": dora}
    train(settings(**options))

    def starts_from(name: str) -> bytes:
        new = tmp_path / "new"
        shutil.rmtree(new, ignore_errors=True)
        train(settings(lora_weights=str(out / name), output_dir=str(new), max_train_steps=1))
        assert (
            '"transformer.lora_alpha": 6.0'
            in header(new / "pytorch_lora_weights.safetensors")[1]["lora_adapter_metadata"]
        )
        return (new / "pytorch_lora_weights.safetensors").read_bytes()

    assert starts_from("checkpoint-4") == starts_from("") == starts_from("checkpoint-4/state.safetensors")
    assert starts_from("checkpoint-2") != starts_from("checkpoint-4")
    with pytest.raises(WeightsError, match=r"checkpoint-9: no such .* has .*checkpoint-4"):
        starts_from("checkpoint-9")
    (out / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(WeightsError, match="checkpoint-4"):
        starts_from("")


def test_a_checkpoint_without_an_adapter(settings: Make, tmp_path: Path) -> None:
    train(settings(max_train_steps=2, train_mode="full"))
    assert {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()} == {"state.json", "state.safetensors"}
    with pytest.raises(WeightsError, match="checkpoint-2"):
        train(settings(lora_weights=str(tmp_path / "out" / "checkpoint-2"), output_dir=str(tmp_path / "new")))


def test_a_tracker_that_cannot_be_opened_changes_no_run(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise SettingsError("wandb: not logged in")

    train(settings(max_train_steps=4))
    names = ("run.json", "settings.yaml", "metrics.jsonl")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    monkeypatch.setattr("mflux_vae_train.dreambooth.reporting.monitor.open_tracker", fails)
    monkeypatch.setattr("mflux_vae_train.monitoring.trackers._installed", lambda name: True)
    changes = {"resume_from_checkpoint": "checkpoint-2", "learning_rate": 0.5, "allow_changes": True}
    with pytest.raises(SettingsError, match="wandb"):
        train(settings(max_train_steps=4, report_to="wandb", **changes))
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
