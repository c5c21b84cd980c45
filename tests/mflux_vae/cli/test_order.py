"""With CUDA, images of one size follow each other; outputs are as without. Latents may be vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae import VAE
from mflux_vae.cli import commands, latent_file
from mflux_vae.images import save_image, stored_size
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.runtime import device
from tests.conftest import Run
from tests.mflux_vae.small_models import drawn, small_kl

SIZES = {"a.png": (24, 16), "b.png": (16, 16), "c.png": (24, 16), "d.png": (16, 16)}


def test_images_of_one_size_follow_each_other(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VAE(network=small_kl()).save_pretrained(tmp_path / "model")
    for index, (name, size) in enumerate(SIZES.items()):
        save_image(tmp_path / "photos" / name, np.full((*size, 3), 40 * index, np.uint8))
    orders: list[list[str]] = []

    def results(folder: Path) -> tuple[Any, Any, list[bytes]]:
        source, latents = (tmp_path / "photos", "--model", tmp_path / "model"), folder / "latents.safetensors"
        assert run("encode", *source, "--output", latents)[0] == 0
        status, out, err = run("reconstruct", *source, "--json")
        assert status == 0, err
        assert run("decode", latents, "--output", folder / "decoded")[0] == 0
        pictures = [file.read_bytes() for file in sorted((folder / "decoded").iterdir())]
        encoded = {name: np.array(entry.latents).tolist() for name, entry in latent_file.read(latents)[0].items()}
        return encoded, json.loads(out), pictures

    def noted(names: list[str], *, of: int) -> list[str]:
        orders.append(list(names))
        return names

    monkeypatch.setattr(commands, "_progress", noted)
    before = results(tmp_path / "before")
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    after = results(tmp_path / "after")
    assert orders == [["a.png", "b.png", "c.png", "d.png"]] * 3 + [["b.png", "d.png", "a.png", "c.png"]] * 3
    assert after == before and list(after[0]) == list(SIZES)


def test_size_of_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    assert stored_size(tmp_path / "a.png") == stored_size(tmp_path / "none.png") == (0, 0)


def test_latents_that_are_vectors_are_decoded(run: Run, tmp_path: Path) -> None:
    network = FlatAutoencoder(FlatConfig(hidden_dims=(4, 6), in_channels=3, latent_dim=3, image_size=8))
    drawn(network)
    VAE(network=network).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    save_image(tmp_path / "photo.png", noise)
    latents = tmp_path / "latents.safetensors"
    assert run("encode", tmp_path / "photo.png", "--output", latents, "--model", tmp_path / "model")[0] == 0
    assert latent_file.read(latents)[0]["photo.png"].latents.ndim == 1
    status, _, err = run("decode", latents, "--output", tmp_path / "decoded")
    assert status == 0 and (tmp_path / "decoded" / "photo.png").is_file(), err
