"""The hub: what is asked for, and what is said where it fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from mflux_vae import WeightsError
from mflux_vae.pretrained import hub, loading
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae.weights.keymaps.diffusers import STEM
from tests.mflux_vae.naming_samples import arrays, kl, named, parameters, same
from tests.mflux_vae.weights.torch_writer import of_arrays, write_zip

TREE = {
    "owner/pipeline": ("model_index.json", "vae/config.json", f"vae/{STEM}.safetensors", f"unet/{STEM}.safetensors"),
    "stabilityai/sdxl-vae": ("config.json", f"{STEM}.safetensors", "sdxl_vae.safetensors"),
    "owner/old": ("config.json", f"{STEM}.bin"),
    "owner/single": ("flux_vae.safetensors", "README.md"),
    "owner/empty": ("config.json",),
}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Repositories in a folder; downloading copies what matches into a cache, and is written down."""
    from fnmatch import fnmatch

    network, cache, asked = kl(), tmp_path / "cache", []
    tensors, storages = of_arrays(arrays(network))

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], revision: str | None) -> str:
        if repo_id not in TREE:
            raise huggingface_hub.errors.RepositoryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None)
            )
        root = cache / repo_id
        root.mkdir(parents=True, exist_ok=True)
        for name in TREE[repo_id]:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                asked.append(f"{repo_id}/{name}")
                path = root / name
                path.parent.mkdir(exist_ok=True)
                if path.suffix == ".json":
                    path.write_text(json.dumps(network.config.to_dict()))
                elif path.suffix == ".bin":
                    write_zip(path, tensors, storages)
                else:
                    write_safetensors(path, named(network))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(network=network, asked=asked)


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("owner/pipeline", f"owner/pipeline/vae/{STEM}.safetensors"),
        ("owner/pipeline/vae", f"owner/pipeline/vae/{STEM}.safetensors"),
        ("sdxl", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("SD-XL", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("stabilityai/sdxl-vae", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("stabilityai/sdxl-vae/sdxl_vae.safetensors", "stabilityai/sdxl-vae/sdxl_vae.safetensors"),
        ("owner/old", f"owner/old/{STEM}.bin"),
        ("owner/single/flux_vae.safetensors", "owner/single/flux_vae.safetensors"),
    ],
)
def test_the_hub_gives_the_autoencoder_and_nothing_else(
    source: str, weights: str, fake_hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert same(parameters(loading.open_network(source)), parameters(fake_hub.network))
    assert {name for name in fake_hub.asked if not name.endswith(".json")} == {weights}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("owner/nothing", "owner/nothing"),
        ("owner/single", "vae/config.json"),
        ("owner/pipeline/unet", "unet/config.json"),
        ("owner/empty", "owner/empty"),
        ("nothing", "nothing: no such file or folder; known presets: sd1, "),
        ("sdlx", r"sdlx: no such file or folder; did you mean sdxl\? known presets: sd1, "),
        ("./owner/pipeline", "no such file or folder; known presets"),
        ("models/vae.safetensors", "no such file or folder; known presets"),
        ("a/b/c.txt", "no such file"),
    ],
)
def test_missing_hub_files(
    source: str, word: str, fake_hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=word):
        loading.open_network(source)


def http(kind: type[Exception]) -> Exception:
    return kind("Client error 403\nmore", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (lambda: http(huggingface_hub.errors.GatedRepoError), "gated"),
        (
            lambda: http(huggingface_hub.errors.HfHubHTTPError),
            r"403",
        ),
        (
            lambda: huggingface_hub.errors.LocalEntryNotFoundError("x"),
            "not cached",
        ),
        (lambda: huggingface_hub.errors.OfflineModeIsEnabled("x"), "not cached"),
        (lambda: huggingface_hub.errors.HFValidationError("x"), "repository name"),
        (lambda: ConnectionResetError("reset by peer"), r"reset by peer"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_failed_downloads(error, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=word) as caught:
        hub.fetch("a/b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "preset", "channels"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux1", 16),
        ("StabilityAI/stable-diffusion-XL-base-1.0", "sdxl", 4),
        ("stabilityai/stable-diffusion-3.5-medium/vae", "sd3", 16),
        ("sd2", "sd2", 4),
    ],
)
def test_published_autoencoders_are_described_without_a_download(
    source: str, preset: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("something was downloaded"))
    found = loading.describe(source)
    assert (found.preset, found.config["latent_channels"], found.dtypes) == (preset, channels, ())
    assert found.parameters > 8e7
    assert loading.new_network(source).config.latent_channels == channels


def test_a_downloaded_autoencoder_is_described_by_its_file(fake_hub, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading.open_network("stabilityai/sdxl-vae")
    monkeypatch.setattr(hub, "cached", lambda repository: tmp_path / "cache" / repository)
    assert loading.describe("stabilityai/sdxl-vae").dtypes == ("float32",)
