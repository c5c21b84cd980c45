"""What a path says about the pictures to draw. Files only, no pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae.errors import InputError, SettingsError, WeightsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.drawing.source import BEST, LAST, read_source
from mflux_vae_train.settings.flags import to_yaml

ADAPTER = "pytorch_lora_weights.safetensors"


def run_folder(root: Path, *, updates: tuple[int, ...] = (2, 10), finished: bool = True, **changes) -> Path:
    """The files of a run that a source is read from."""
    given = {"model": "fake", "instance_data_dir": "photos", "instance_prompt": "a photo of sks dog"}
    stated = DreamBoothSettings(**(given | {"output_dir": str(root)} | changes))
    derived = {"resolution": 32, "guidance": 4.0, "validation_prompt": ("a photo of sks dog",)}
    resolved = DreamBoothSettings(**(given | {"output_dir": str(root)} | derived | changes))
    for update in updates:
        (root / f"checkpoint-{update}").mkdir(parents=True)
        write_safetensors(root / f"checkpoint-{update}" / ADAPTER, {"x": mx.zeros(1)})
    root.mkdir(exist_ok=True)
    if finished:
        write_safetensors(root / ADAPTER, {"x": mx.zeros(1)})
    (root / "settings.yaml").write_text(to_yaml(resolved, stated))
    (root / "run.json").write_text("{}")
    return root


def test_a_run_says_everything_wherever_it_lies(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "old", seed=7, num_inference_steps=3, quantize=4, num_validation_images=2)
    root = Path(shutil.move(root, tmp_path / "new"))
    source = read_source(str(root))
    assert [*source.adapters] == ["2", "10", LAST] and source.chosen == LAST
    assert source.file("10") == root / "checkpoint-10" / ADAPTER
    assert (source.model, source.size, source.seed, source.steps, source.quantize) == ("fake", (32, 32), 7, 3, 4)
    assert source.guidance is None, "it was derived from the trained model's"
    assert (source.prompts, source.images, source.identifier) == (("a photo of sks dog",), 2, "sks")
    assert read_source(str(root), "other").model == "other"
    assert source.label("checkpoint-2") == "2"
    with pytest.raises(SettingsError, match="2, 10, last"):
        source.label("4")
    write_safetensors(root / "best" / ADAPTER, {"x": mx.zeros(1)})
    assert [*read_source(str(root)).adapters] == ["2", "10", LAST, BEST]
    assert read_source(str(root / "best")).chosen == BEST


def test_the_preview_model_draws_with_its_recommendations(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run", preview_model="fast", vae="taef1", revision="v2", guidance=2.0)
    source = read_source(str(root))
    assert (source.model, source.vae, source.revision, source.guidance) == ("fast", "taef1", None, 2.0)


@pytest.mark.parametrize("inside", ["checkpoint-2", f"checkpoint-2/{ADAPTER}"])
def test_a_checkpoint_belongs_to_its_run(inside: str, tmp_path: Path) -> None:
    source = read_source(str(run_folder(tmp_path / "200") / inside))
    assert source.chosen == "2" and source.model == "fake" and LAST in source.adapters


def test_an_unfinished_run_has_its_newest_checkpoint(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run", finished=False)
    assert read_source(str(root)).file(LAST).parent.name == "checkpoint-10"
    with pytest.raises(SettingsError, match="no adapter yet"):
        read_source(str(run_folder(tmp_path / "new", updates=(), finished=False)))


def test_a_missing_path_and_a_missing_checkpoint_are_named(tmp_path: Path, monkeypatch) -> None:
    run_folder(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="has checkpoint-2, checkpoint-10"):
        read_source("run/checkpoint-4")
    for path in ("nowhere.safetensors", "run/none"):
        with pytest.raises(InputError, match="no such file"):
            read_source(path)


def test_an_adapter_needs_a_model_and_may_name_it(tmp_path: Path) -> None:
    run_folder(tmp_path)  # of another adapter: a folder in it is not a part of it
    tmp_path = tmp_path / "loras"
    tmp_path.mkdir()
    file = tmp_path / "a.safetensors"
    write_safetensors(file, {"x": mx.zeros(1)}, {"lora_adapter_metadata": "{}"})
    with pytest.raises(SettingsError, match="--model is missing"):
        read_source(str(file))
    (tmp_path / "README.md").write_text("---\nbase_model: owner/base\n---\n\n# text\n")
    with pytest.raises(SettingsError, match="model card names owner/base"):
        read_source(str(file))
    (tmp_path / "README.md").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    with pytest.raises(SettingsError, match="owner/other"):
        read_source(str(file))
    source = read_source(str(file), "fake")
    assert source.file(LAST) == file and source.root is None and source.size is None
    with pytest.raises(SettingsError, match="--checkpoint"):
        source.label("200")


def test_all_weights_are_drawn_as_they_are(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run", updates=(), finished=False, train_mode="full", variant="fp16")
    with pytest.raises(SettingsError, match="end of the run"):
        read_source(str(root))
    (root / "pipeline").mkdir()
    source = read_source(str(root)).changed(steps=5)
    assert source.model == str(root / "pipeline") and source.variant is None and not source.adapters
    assert source.untrained is not None
    assert (source.untrained.model, source.untrained.variant, source.untrained.steps) == ("fake", "fp16", 5)
    with pytest.raises(SettingsError, match="all weights"):
        source.label("200")
