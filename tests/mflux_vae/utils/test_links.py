"""Links that lead nowhere are named wherever a file or folder is opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mflux_vae.errors import InputError
from mflux_vae.images import load_image
from mflux_vae.pretrained.locate import locate
from mflux_vae.utils.links import missing
from mflux_vae.utils.yaml_io import read_yaml
from mflux_vae.weights.formats.files import header, open_folder, read_json
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.lora.location import adapter_file
from mflux_vae_train.lora.metadata import Statements
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.pipelines.tiny import WEIGHTS
from mflux_vae_train.vae.data.batches import open_data
from tests.contracts.fake import FakePipeline


def test_the_target_is_named(tmp_path):
    (tmp_path / "a").symlink_to("/nope/a")
    assert "/nope/a" in missing(tmp_path / "a") and "/nope/a" in missing(tmp_path / "a" / "b" / "c.png")
    assert missing(tmp_path / "b") == "does not exist"
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in missing(tmp_path / "loop", "")


@pytest.mark.parametrize(
    "opening",
    [
        load_image,
        locate,
        read_yaml,
        header,
        read_json,
        open_pipeline,
        lambda path: open_data(path, size=4, channels=3),
        lambda path: locate(WEIGHTS / "vae", path),
        lambda path: open_folder(path.parent, "model"),
    ],
)
def test_files_and_folders(tmp_path, opening):
    path = tmp_path / "model.safetensors"
    path.symlink_to("/nope/blob")
    with pytest.raises(InputError, match=r"link to /nope/blob.*cp -L"):
        opening(str(path) if opening is open_pipeline else path)


@pytest.mark.parametrize("name", ["output_dir", "encodings_dir", "logging_dir", "class_data_dir", "instance_data_dir"])
def test_folders_of_a_run(tmp_path, name):
    (tmp_path / "link").symlink_to("/nope")
    given = {"instance_data_dir": str(WEIGHTS.parent / "example"), "output_dir": str(tmp_path / "out")}
    given |= {name: str(tmp_path / "link")}
    settings = DreamBoothSettings(model="fake", instance_prompt="a photo of sks star", **given)
    with pytest.raises(InputError, match=r"link to /nope"):
        DreamBooth(FakePipeline()).train(settings)
    assert not (tmp_path / "out" / "run.json").exists()


def copied_snapshot(tmp_path: Path, inside: str) -> Path:
    """A copy of a part of the hub's cache: links into a folder that was not copied."""
    folder = tmp_path / "copied"
    shutil.copytree(WEIGHTS / inside, folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
        path.symlink_to(os.path.relpath(tmp_path / "blobs" / path.name, path.parent))
    return folder


def test_a_copied_snapshot_without_its_files(tmp_path):
    for inside, opening in ((".", open_pipeline), ("vae", locate)):
        with pytest.raises(InputError, match=r"link.*blobs.*cp -L"):
            opening(str(copied_snapshot(tmp_path / inside.strip("."), inside)))


def test_a_single_link_among_the_files_of_a_pipeline(tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(WEIGHTS, folder)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    (folder / "tokenizer" / "tokenizer.json").symlink_to("/nope/blob")
    with pytest.raises(InputError, match=r"tokenizer\.json -> /nope/blob"):
        open_pipeline(str(folder))


def test_a_link_that_no_file_is_needed_for_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "tiny"
    shutil.copytree(WEIGHTS, folder)
    (folder / "recommended.json").unlink()
    (folder / "recommended.json").symlink_to("/nope/blob")
    open_pipeline(str(folder))
    assert "recommended.json -> /nope/blob" in caplog.text


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_links_in_the_folder_of_an_adapter(tmp_path, name):
    (tmp_path / name).symlink_to("/nope/blob")
    with pytest.raises(InputError, match=rf"{name} -> /nope/blob"):
        adapter_file(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "adapter_config.json").symlink_to("/nope/config")
    if name.startswith("adapter"):
        with pytest.raises(InputError, match="/nope/config"):
            Statements({}, tmp_path / name)
