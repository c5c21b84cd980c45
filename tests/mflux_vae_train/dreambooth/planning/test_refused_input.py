"""Wrong input is refused before anything long starts."""

from __future__ import annotations

import pytest

from mflux_vae.errors import ImageError, PluginError, SettingsError
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.contracts.fake import FakePipeline


@pytest.fixture
def settings(short_run):
    """Settings of a short run with class images; keyword arguments change them."""
    return lambda **changes: short_run(**{"num_class_images": 4, **changes})


def refused(settings, message, kind=SettingsError, pipeline=None):
    pipeline = pipeline or FakePipeline()
    with pytest.raises(kind, match=message):
        DreamBooth(pipeline).train(settings)
    assert pipeline.images_encoded == pipeline.images_sampled == 0
    assert not pipeline.prompts_encoded


def test_a_missing_folder(settings):
    refused(settings(instance_data_dir="nowhere"), "nowhere does not exist", ImageError)


def test_a_folder_without_images(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(settings(instance_data_dir=str(tmp_path / "empty")), "no image", ImageError)


def test_a_broken_image(settings, instance_dir):
    (instance_dir / "picture-3.png").write_bytes(b"not a picture")
    refused(settings(), r"picture-3\.png", ImageError)


def test_a_broken_class_image(settings, tmp_path):
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "one.jpg").write_bytes(b"not a picture")
    refused(settings(class_data_dir=str(tmp_path / "dogs")), r"one\.jpg", ImageError)


def test_an_invalid_resolution(settings):
    refused(settings(resolution=18), "--resolution is 18")


def test_no_class_prompt(settings):
    refused(settings(instance_prompt="a photo of xyz", with_prior_preservation=True), "needs --class_prompt")


def test_a_file_as_output(settings, tmp_path):
    (tmp_path / "file").write_text("")
    refused(settings(output_dir=str(tmp_path / "file")), "is a file, not a folder")
    refused(settings(output_dir=str(tmp_path / "file" / "below")), "file is a file, not a folder")
    refused(settings(class_data_dir=str(tmp_path / "file")), "--class_data_dir .* is a file")


def test_foreign_files_in_the_output_folder(settings, tmp_path):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    refused(settings(), r"holds checkpoint-7, but no run\.json")


@pytest.mark.parametrize("name", ["README.md", "settings.yaml", "report.html"])
def test_foreign_files_are_not_overwritten(settings, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    refused(settings(), rf"holds {name}, but no run\.json")
    assert (tmp_path / "out" / name).read_text() == "precious"


def test_a_broken_run_file(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    refused(settings(), r"run\.json is broken")


def test_a_missing_checkpoint(settings):
    refused(settings(resume_from_checkpoint="nowhere"), "nowhere is not a folder")


def test_targets_without_a_match(settings):
    pipeline = FakePipeline()
    pipeline.lora_targets = lambda: ["attention.*"]
    refused(settings(), r"no linear layer matches attention\.\*; the module has blocks\.0\.to_out", pipeline=pipeline)


def test_a_pipeline_with_an_adapter(settings, tmp_path):
    pipeline = FakePipeline()
    DreamBooth(pipeline).train(settings())
    with pytest.raises(SettingsError, match="carries an adapter already"):
        DreamBooth(pipeline).train(settings(output_dir=str(tmp_path / "second")))


def test_an_object_that_is_not_a_pipeline():
    with pytest.raises(PluginError, match="adapter_prefix"):
        DreamBooth(object())
