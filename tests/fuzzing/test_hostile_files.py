"""Small files that would fill the memory, and names that lead out of a folder: one line each, and nothing else."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.image_folder.scan import ImageFolder
from mflux_vae.images import load_image
from mflux_vae.utils.yaml_io import read_yaml
from mflux_vae.weights.formats.files import open_folder
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.flow.files import read_configs
from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.settings import flags
from mflux_vae_train.vae.data.sources import mnist, npz
from tests.fuzzing.targets import TARGETS

LITTLE = 8 * 2**20


@contextmanager
def little_memory(bytes_allowed: int = LITTLE) -> Iterator[None]:
    """What Python and numpy take within the block stays below this."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bytes_allowed
    finally:
        tracemalloc.stop()


def png(width: int, height: int) -> bytes:
    """A picture of so many pixels, all of them black, in few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_picture_of_four_billion_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(65_000, 65_000))
    with little_memory(), pytest.raises(ImageError, match="make it smaller"):
        load_image(tmp_path / "a.png")


def test_aliases_that_stand_for_billions(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with little_memory(), pytest.raises(SettingsError, match="aliases"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: &a [*a]")
    with pytest.raises(SettingsError, match="aliases"):
        flags.from_yaml(DreamBoothSettings, tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: &one {x: 1}\nb: *one\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1}, "b": {"x": 1}}


def test_numbers_that_are_none(tmp_path: Path) -> None:
    for value in (".nan", ".inf", "1" * 400, "1e999"):
        (tmp_path / "a.yaml").write_text(
            f"model: tiny\ninstance_data_dir: a\ninstance_prompt: b\nmax_grad_norm: {value}\n"
        )
        with pytest.raises(SettingsError, match=r"max_grad_norm|YAML"):
            flags.from_yaml(DreamBoothSettings, tmp_path / "a.yaml")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "9" * 5000, "[" * 50_000])
def test_numbers_that_are_none_in_configurations(value: str, tmp_path: Path) -> None:
    config = (tiny.VAE_WEIGHTS / "config.json").read_text()
    assert '"scaling_factor": ' in config
    before, _, after = config.partition('"scaling_factor": ')
    (tmp_path / "config.json").write_text(f'{before}"scaling_factor": {value},{after.partition(",")[2]}')
    with pytest.raises((WeightsError, SettingsError), match=r"config\.json|scaling_factor"):
        TARGETS["autoencoder's config"].read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", "2000000000"), ("in_channels", '"64"'), ("num_layers", "2.5")]
)
def test_a_transformer_of_two_billion_layers(name: str, value: str, tmp_path: Path) -> None:
    target = TARGETS["transformer/config.json"]
    config = target.seeds[0].decode()
    for other, content in [*target.beside, (target.file, config.encode())]:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(content)
    before, _, after = config.partition(f'"{name}": ')
    (tmp_path / target.file).write_text(f'{before}"{name}": {value},{after.partition(",")[2]}')
    with little_memory(), pytest.raises(WeightsError, match=name):
        read_configs(FAMILY, tmp_path)


def test_files_that_unpack_to_a_thousand_times_their_size(tmp_path: Path) -> None:
    shape = b"\0\0\x08\x03" + struct.pack(">3I", 2000, 400, 100)
    (tmp_path / "a.gz").write_bytes(gzip.compress(shape + bytes(80_000_000)))
    with pytest.raises(ImageError, match="100 times"):
        mnist(tmp_path / "a.gz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.save(file, np.zeros((800, 400, 250), np.uint8))  # type: ignore[arg-type]
    with little_memory(), pytest.raises(ImageError, match="100 times"):
        npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "link.safetensors", "..", "a\0b", "x" * 5000])
def test_shards_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    content = TARGETS["safetensors"].seeds[0]
    (tmp_path / "a.safetensors").write_bytes(content)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="not a file in this folder"):
        open_folder(folder, "model")


def test_links_of_the_hubs_cache_and_within_a_folder_are_followed(tmp_path: Path) -> None:
    content, index = TARGETS["safetensors"].seeds[0], '{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}'
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "vae"
    blobs = tmp_path / "models--a--b" / "blobs"
    for place in (snapshot, blobs, tmp_path / "plain"):
        place.mkdir(parents=True)
        (place / "model.safetensors.index.json").write_text(index)
    (blobs / "abc").write_bytes(content)
    (snapshot / "1.safetensors").symlink_to(os.path.relpath(blobs / "abc", snapshot))
    (tmp_path / "plain" / "real").write_bytes(content)
    (tmp_path / "plain" / "1.safetensors").symlink_to("real")
    (tmp_path / "other").symlink_to(tmp_path / "plain")
    for folder in (snapshot, tmp_path / "plain", tmp_path / "other"):
        assert open_folder(folder, "model").keys() == {"a", "b"}


def test_prompts_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud800"}')
    with pytest.raises(SettingsError, match="UTF-8"):
        captions(ImageFolder(folder=tmp_path, images=("a.png",), metadata="metadata.jsonl"), prompt="a")
    for prompt in ("a\0b", "\ud800"):
        with pytest.raises(SettingsError, match="--instance_prompt"):
            DreamBoothSettings(model="tiny", instance_data_dir="a", instance_prompt=prompt)
