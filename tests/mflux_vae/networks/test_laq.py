"""LAPA's latent action quantizer: its size, what its files tell, what it refuses, and that codes mean something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae import VAE
from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.networks.laq import LAQConfig, LatentActionQuantizer, code_counts
from mflux_vae.pretrained import detect, loading
from tests.conftest import Run

GOLDEN = Path(__file__).parents[1] / "golden/laq"


@pytest.fixture(scope="module")
def network() -> Any:
    return loading.open_network(GOLDEN / "vae.pt", config=GOLDEN / "config.json", pairs=True)


def frames(seed: int, count: int = 2, size: int = 32) -> mx.array:
    return mx.random.uniform(-1, 1, (count, size, size, 3), key=mx.random.key(seed))


def test_the_published_network_has_its_size_and_is_recognised_by_its_shapes() -> None:
    parameters = dict(tree_flatten(LatentActionQuantizer().parameters()))
    assert sum(value.size for value in parameters.values()) == 343_796_080
    shapes = {name: value.shape for name, value in parameters.items()}
    assert detect.settings("LatentActionQuantizer", "lapa", shapes, "x.pt") == LAQConfig().to_dict()


@pytest.mark.parametrize("changes", [{"code_seq_len": 1}, {"patch_size": 16, "code_seq_len": 16}, {"channels": 1}])
def test_others_are_recognised_too(changes: dict[str, int]) -> None:
    config = LAQConfig(**{"dim": 8, "heads": 2, "spatial_depth": 1, "temporal_depth": 2, "dim_head": 4, **changes})
    shapes = {name: value.shape for name, value in tree_flatten(LatentActionQuantizer(config).parameters())}
    assert detect.settings("LatentActionQuantizer", "lapa", shapes, "x.pt") == config.to_dict()


def test_frames_of_another_size_need_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"256 pixels"):
        loading.open_network(GOLDEN / "vae.pt", pairs=True)
    network: Any = loading.open_network(GOLDEN / "vae.pt", config=GOLDEN / "config.json", pairs=True)
    loading.save_network(network, tmp_path / "laq.safetensors")  # which knows its own
    again: Any = loading.open_network(tmp_path / "laq.safetensors", pairs=True)
    assert again.config == network.config
    assert mx.array_equal(again.difference(frames(0), frames(1)), network.difference(frames(0), frames(1)))
    told = loading.describe(tmp_path / "laq.safetensors")
    assert told.family == "LatentActionQuantizer" and told.naming == "lapa"
    assert told.parameters == loading.describe(GOLDEN / "vae.pt", config=GOLDEN / "config.json").parameters
    assert told.parameters == sum(value.size for value in dict(tree_flatten(network.parameters())).values())


def test_what_takes_images_refuses_it(run: Run) -> None:
    with pytest.raises(WeightsError, match="pairs of frames"):
        VAE.from_pretrained(GOLDEN / "vae.pt", config=GOLDEN / "config.json")
    status, told, err = run("info", GOLDEN / "vae.pt", "--config", GOLDEN / "config.json")
    assert status == 0 and "4 codes of 8" in told and "lapa naming" in told, err


def test_batches_are_their_pairs_one_by_one(network: Any) -> None:
    first, last = frames(0, 3), frames(1, 3)
    codes = network.encode(first, last)
    assert codes.shape == (3, 4) and len(set(codes.flatten().tolist())) > 1
    decoded = network.decode(first, codes)
    for i in range(3):
        one = slice(i, i + 1)
        assert mx.array_equal(network.encode(first[one], last[one]), codes[one])
        assert mx.allclose(network.decode(first[one], codes[one]), decoded[one], atol=1e-5)


def test_the_second_frame_depends_on_codes_and_on_the_first(network: Any) -> None:
    first = frames(0, 1)
    made = [network.decode(first, mx.array([codes])) for codes in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1])]
    assert all(mx.abs(a - b).max() > 1e-3 for a, b in ((made[0], made[1]), (made[0], made[2])))
    assert mx.abs(network.decode(frames(1, 1), mx.array([[0, 0, 0, 0]])) - made[0]).max() > 1e-2


def test_mismatched_frames_are_refused(network: Any) -> None:
    with pytest.raises(ImageError, match=r"frames of a pair"):
        network.encode(frames(0, 1), frames(1, 2))
    with pytest.raises(ImageError, match=r"expected \(B, 32, 32, 3\)"):
        network.encode(frames(0, size=40), frames(1, size=40))
    for codes in (mx.zeros((2, 4)), mx.zeros((2, 3), mx.int32), mx.full((2, 4), 8, mx.int32)):
        with pytest.raises(ImageError, match="codes"):
            network.decode(frames(0), codes)


def test_numbers_of_codes_follow_from_patches() -> None:
    assert (code_counts(8), code_counts(16), code_counts(32), code_counts(5)) == ([1, 4], [16, 64], [256], [])
    assert code_counts(8, [3, 3]) == [4] and code_counts(8, [3, 4]) == [1] and code_counts(16, [3]) == [64]
    with pytest.raises(SettingsError, match="code_seq_len"):
        LAQConfig(code_seq_len=2)
    with pytest.raises(SettingsError, match="patch_size"):
        LAQConfig(patch_size=48)
