"""Weighted sums of adapters with different layers, ranks and alphas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.lora.editing.merging import merged, merged_targets
from mflux_vae_train.lora.editing.resizing import resized, scaled
from tests.mflux_vae_train.lora.editing.random_changes import assert_equal, change, deltas, saved


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("adapters")
    first = {"down": change("down", 3, scale=2.0), "out": change("out", 2, scale=0.5)}
    second = {"down": change("down", 1, scale=0.3, seed=1), "block.1": change("block.1", 2, seed=1)}
    return [saved(folder / f"{i}.safetensors", {"unet": one}) for i, one in enumerate((first, second))]


def test_a_sum_is_exact(files, tmp_path: Path) -> None:
    weights = (0.7, -0.5)
    expected: dict[str, np.ndarray] = {}
    for file, weight in zip(files, weights, strict=True):
        for path, delta in deltas(file.changes).items():
            expected[path] = expected.get(path, 0.0) + weight * delta
    changes = merged(files, weights)
    found = saved(tmp_path / "sum.safetensors", changes)
    assert_equal(found.changes, expected)
    assert {path: one.rank for path, one in found.changes["unet"].items()} == {"down": 4, "block.1": 2, "out": 2}
    assert all(one.scale == 1 for one in found.changes["unet"].values())
    cut = resized(changes, rank=2)
    lost = {path: np.linalg.norm(delta - expected[path]) for path, delta in deltas(cut.changes).items()}
    total = np.sqrt(sum(np.sum(one**2) for one in expected.values()))
    assert cut.error == pytest.approx(np.sqrt(sum(one**2 for one in lost.values())) / total, rel=1e-4)
    assert cut.errors["unet.down"] == pytest.approx(lost["down"] / np.linalg.norm(expected["down"]), rel=1e-4)
    assert cut.errors["unet.out"] < 1e-6


def test_names_of_layers_are_joined_where_all_files_list_them(files) -> None:
    other = replace(files[1], targets={})
    names = sorted({*files[0].targets["unet"], *files[1].targets["unet"]})
    assert merged_targets(files) == {"unet": names} and not merged_targets([files[0], other])


def test_what_cannot_be_added_is_refused(files) -> None:
    dora = replace(files[0], changes={"unet": {"out": change("out", 2, dora=True)}})
    other = replace(files[0], changes={"unet": {"out": replace(change("down", 2), kernel=None)}})
    with pytest.raises(WeightsError, match="DoRA"):
        merged([files[0], dora], [1.0, 1.0])
    with pytest.raises(WeightsError, match="shape"):
        merged([files[0], other], [1.0, 1.0])
    with pytest.raises(SettingsError, match="weights"):
        merged(files, [1.0])


def test_a_factor_is_in_the_weights(files) -> None:
    found = scaled(files[0].changes, -0.8)
    assert_equal(found, {path: -0.8 * delta for path, delta in deltas(files[0].changes).items()})
    assert all(one.scale == 1 for one in found["unet"].values())


def test_magnitudes_stay_when_the_rank_falls() -> None:
    given = change("out", 3, dora=True)
    (found,) = resized({"unet": {"out": given}}, rank=1).changes["unet"].values()
    assert found.rank == 1 and found.magnitudes is given.magnitudes
