"""LAPA's latent action quantizer against its formulas in torch, live, and files that torch writes and reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402

from mflux_vae.networks.laq import LAQConfig  # noqa: E402
from mflux_vae.pretrained import loading  # noqa: E402
from tests.parity.make_golden import LAQ, randomise_laq  # noqa: E402
from tests.parity.references.lapa import TheirLatentActionQuantization  # noqa: E402

CONFIGS = {
    "4 codes": LAQ,
    "1 code": replace(LAQ, code_seq_len=1),
    "16 codes": replace(LAQ, code_seq_len=16, image_size=64),
    "deep": replace(LAQ, spatial_depth=3, temporal_depth=3, heads=4, codebook_size=64),
    "grey": replace(LAQ, channels=1, dim=24),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def theirs(request: pytest.FixtureRequest) -> Any:
    model = TheirLatentActionQuantization(request.param).eval()
    randomise_laq(model)
    model.config = request.param
    return model


@torch.no_grad()
def test_codes_and_frames_are_theirs(theirs: Any, tmp_path: Path) -> None:
    config = theirs.config
    torch.save({f"module.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "laq.pt")
    ours: Any = loading.open_network(tmp_path / "laq.pt", mx.float32, config=config.to_dict(), pairs=True)
    size = 3, config.channels, config.image_size, config.image_size
    frames = [torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    first, last = (mx.array(frame.numpy().transpose(0, 2, 3, 1)) * 2 - 1 for frame in frames)
    expected = theirs.difference(*frames)
    np.testing.assert_allclose(ours.difference(first, last), expected, rtol=0, atol=1e-4 * expected.abs().max())
    codes = theirs.encode(*frames)
    assert np.array_equal(ours.encode(first, last), codes)
    expected = theirs.decode(frames[0], codes).permute(0, 2, 3, 1)
    found = np.array(ours.decode(first, mx.array(codes.numpy()))) / 2 + 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_a_file_of_ours_has_their_keys_but_for_what_holds_nothing(theirs: Any, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), tmp_path / "laq.pt")
    loading.convert(tmp_path / "laq.pt", tmp_path / "laq.safetensors", "lapa", config=theirs.config.to_dict())
    written = mx.load(str(tmp_path / "laq.safetensors"))
    state = theirs.state_dict()
    assert written.keys() <= state.keys()
    for key, value in state.items():
        if key in written:
            assert np.array_equal(written[key], value), key
        else:
            assert not value.numel() or (key.endswith(".beta") and not value.any()), key


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = TheirLatentActionQuantization(LAQConfig())
    assert sum(value.numel() for value in model.parameters()) == 343_796_080
