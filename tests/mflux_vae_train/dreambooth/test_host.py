"""A host of thirty lines: a program that trains its pipeline through the entry point."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae_train import lora
from mflux_vae_train import plugin as plugin_module
from mflux_vae_train.monitoring.progress import Progress
from mflux_vae_train.plugin import DreamBooth, Interrupted
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


def test_a_host_receives_the_progress(short_run):
    seen: list[Progress] = []
    trained = FakePipeline()
    DreamBooth(trained).train(short_run(num_class_images=2, max_train_steps=3), seen.append)
    phases = list(dict.fromkeys(one.phase for one in seen))
    assert phases == ["text encoding", "class images", "latents", "training", "finished"]
    updates = [one for one in seen if one.loss is not None]
    assert [one.update for one in updates] == [1, 2, 3] and all(one.total == 3 for one in seen)
    assert all(one.phase == "training" and one.loss > 0 and one.eta is not None for one in updates)
    again: list[Progress] = []
    finished = FakePipeline()
    DreamBooth(finished).train(short_run(num_class_images=2, max_train_steps=3), on_progress=again.append)
    assert [(one.phase, one.update) for one in again] == [("finished", 3)]
    ours, theirs = lora.layers(trained.denoiser), lora.layers(finished.denoiser)
    assert ours and ours.keys() == theirs.keys()
    for path, layer in ours.items():
        scaled = [one.scale * (one.lora_a @ one.lora_b) for one in (layer, theirs[path])]
        assert mx.allclose(*scaled, atol=1e-6).item()


def test_a_host_stops_a_run_by_an_exception(short_run):
    class Cancelled(Exception):
        pass

    def cancel(progress: Progress) -> None:
        if progress.phase == "training" and progress.update == 2:
            raise Cancelled

    run = short_run(prior_preservation="none", max_train_steps=4)
    with pytest.raises(Cancelled):
        DreamBooth(FakePipeline()).train(run, cancel)
    seen: list[Progress] = []
    assert DreamBooth(FakePipeline()).train(run, seen.append).updates == 2
    assert seen[0].update == 2 and not issubclass(Interrupted, DreamBooth.Error)
    assert issubclass(Interrupted, KeyboardInterrupt) and "KeyboardInterrupt" in (DreamBooth.train.__doc__ or "")


SILENT_HOST = """
import sys
{logging}
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.contracts.fake import FakePipeline
settings = DreamBooth.Settings(
    model="host", instance_data_dir=sys.argv[1], instance_prompt="a photo of sks dog", output_dir=sys.argv[2],
    max_train_steps=2, num_validation_images=0, prior_preservation="none", guidance=77.0,
)
DreamBooth(FakePipeline()).train(settings)
"""


@pytest.mark.parametrize(
    ("code", "infos"),
    [("", 0), ("import logging; logging.basicConfig()", 0), ("import logging; logging.basicConfig(level=20)", 1)],
)
def test_a_host_sees_each_message_once_from_its_level_on(code, infos, instance_dir, tmp_path):
    command = [sys.executable, "-c", SILENT_HOST.format(logging=code), str(instance_dir), str(tmp_path / "out")]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.count("--guidance is 77") == 1
    assert done.stderr.count("updates of 4 x 1") == infos
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines))
    assert "updates of 4 x 1" in (tmp_path / "out" / "train.log").read_text()
