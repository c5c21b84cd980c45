"""Agreement with answers of the originals in torch (`tests/parity/make_golden.py`), wherever the tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import VAE
from mflux_vae.pretrained import loading

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["", "attention", "flux2", "tiny"])
def test_a_folder_of_diffusers_answers_as_diffusers_does(name: str) -> None:
    folder = GOLDEN / name
    network = VAE.from_pretrained(folder).network
    golden = {key: value.transpose(0, 2, 3, 1) for key, value in mx.load(str(folder / "golden.safetensors")).items()}

    posterior = network.encode(golden["pixels"])
    found = [posterior.mean]
    expected = [golden["moments"]]
    if name != "tiny":
        found.append(posterior.logvar)
        expected = mx.split(golden["moments"], 2, axis=-1)
    found.append(network.decode(expected[0]))
    expected.append(golden["decoded"])
    if "scaled" in golden:
        found.append(network.to_scaled(expected[0]))
        expected.append(golden["scaled"])

    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_a_folder_of_diffusers_says_how_latents_are_scaled() -> None:
    vae = VAE.from_pretrained(GOLDEN)
    assert (vae.scaling_factor, vae.shift_factor, vae.spatial_scale) == (0.3611, 0.1159, 4)
    raw = mx.random.normal((1, 4, 4, 4), key=mx.random.key(0))
    playground = VAE.from_pretrained(GOLDEN / "attention").network
    scaled = (np.array(raw) - (0.5, -0.25, 0.125, 1.0)) * 0.18215 / (2.0, 0.5, 1.5, 3.0)
    np.testing.assert_allclose(playground.to_scaled(raw), scaled, rtol=1e-5, atol=1e-6)


def test_a_file_of_lapa_answers_as_lapa_does() -> None:
    network: Any = loading.open_network(GOLDEN / "laq/vae.pt", config=GOLDEN / "laq/config.json", pairs=True)
    golden = mx.load(str(GOLDEN / "laq/golden.safetensors"))
    first, last, decoded = (golden[key].transpose(0, 2, 3, 1) * 2 - 1 for key in ("first", "last", "decoded"))
    np.testing.assert_allclose(network.difference(first, last), golden["difference"], rtol=0, atol=1e-5)
    assert np.array_equal(network.encode(first, last), golden["codes"])
    np.testing.assert_allclose(network.decode(first, golden["codes"]), decoded, rtol=0, atol=1e-4)
