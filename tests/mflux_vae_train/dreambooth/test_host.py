"""A host of thirty lines: a program that trains its pipeline through the entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from mflux_vae_train import plugin as plugin_module
from tests.contracts.fake import FakePipeline


def host(own_pipeline, pictures, output):
    """Find the plugin, train a pipeline object, and return the path of the adapter."""
    (entry,) = entry_points(group="mflux.plugins", name="dreambooth")
    DreamBooth = entry.load()
    settings = DreamBooth.Settings(
        model="the host's own",
        instance_data_dir=str(pictures),
        instance_prompt="a photo of sks dog",
        output_dir=str(output),
        max_train_steps=3,
        num_class_images=2,
    )
    try:
        return DreamBooth(own_pipeline).train(settings).result
    except DreamBooth.Error as error:
        raise SystemExit(f"training failed: {error}") from error


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The entry point of this package; registered by hand if it runs from a checkout."""
    if not entry_points(group="mflux.plugins", name="dreambooth"):
        metadata = tmp_path / "site" / "mflux_vae-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mflux-vae\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[mflux.plugins]\ndreambooth = mflux_vae_train.plugin:DreamBooth\n")
        monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_host_finds_the_plugin_and_trains_its_own_pipeline(installed, instance_dir, tmp_path):
    adapter = host(FakePipeline(), instance_dir, tmp_path / "out")
    assert adapter == tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert adapter.stat().st_size > 0


def test_a_host_gets_a_one_line_error(installed, tmp_path):
    with pytest.raises(SystemExit, match=r"training failed: .*nowhere does not exist"):
        host(FakePipeline(), tmp_path / "nowhere", tmp_path / "out")


def test_public_names_of_the_plugin():
    assert plugin_module.__all__ == [
        "Conditioning",
        "DiffusionPipeline",
        "DreamBooth",
        "DreamBoothSettings",
        "InputError",
        "Interrupted",
        "MfluxVaeError",
        "PluginError",
        "Recommended",
        "RunError",
        "TrainingResult",
    ]
    assert all(hasattr(plugin_module, name) for name in plugin_module.__all__)
