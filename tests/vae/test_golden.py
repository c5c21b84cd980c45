"""Agreement with answers that diffusers gave (`tests/parity/make_golden.py`), wherever the tests run."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae import VAE

GOLDEN = Path(__file__).parent / "golden"


def test_a_folder_of_diffusers_answers_as_diffusers_does() -> None:
    vae, golden = VAE.from_pretrained(GOLDEN), mx.load(str(GOLDEN / "golden.safetensors"))
    assert (vae.scaling_factor, vae.shift_factor, vae.spatial_scale) == (0.3611, 0.1159, 4)

    posterior = vae.network.encode(golden["pixels"].transpose(0, 2, 3, 1))
    mean, logvar = np.split(np.array(golden["moments"].transpose(0, 2, 3, 1)), 2, axis=-1)
    for ours, theirs in ((posterior.mean, mean), (posterior.logvar, logvar)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(mean).max())

    decoded = np.array(golden["decoded"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(vae.network.decode(mx.array(mean)), decoded, rtol=0, atol=1e-4 * np.abs(decoded).max())
