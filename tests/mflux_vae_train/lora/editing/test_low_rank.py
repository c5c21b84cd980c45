"""Nearest matrices of a lower rank: as good as the singular values allow, balanced, exact where the rank suffices."""

from __future__ import annotations

import numpy as np
import pytest

from mflux_vae_train.lora.editing import low_rank
from mflux_vae_train.lora.editing.low_rank import cut, energy
from tests.mflux_vae_train.lora.editing.random_changes import change, deltas


def delta(one) -> np.ndarray:
    return deltas({"": {"layer": one}})["layer"]


@pytest.mark.parametrize("layer", ["down", "out"])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_factors_are_cut_where_the_whole_matrix_would_be(layer: str, rank: int) -> None:
    given = change(layer, 4, scale=-0.7)
    found, sizes = cut(given, rank=rank), np.linalg.svd(delta(given), compute_uv=False)
    assert found.change.rank == min(rank, *given.b.shape, given.rank) and found.change.kernel == given.kernel
    assert found.total == pytest.approx(np.sum(sizes**2), rel=1e-5) == energy(given)
    assert found.kept == pytest.approx(np.sum(sizes[:rank] ** 2), rel=1e-5)
    lost = np.sum((delta(given) - delta(found.change)) ** 2)
    assert lost == pytest.approx(found.total - found.kept, rel=1e-3, abs=1e-5)
    assert np.linalg.norm(found.change.a) == pytest.approx(np.linalg.norm(found.change.b), rel=1e-5)


def test_the_fewest_ranks_with_a_share_are_kept() -> None:
    given = change("down", 4)
    squares = np.linalg.svd(delta(given), compute_uv=False) ** 2
    for keep in (0.3, 0.7, 0.9, 1.0):
        count = cut(given, keep=keep).change.rank
        assert squares[:count].sum() >= keep * squares.sum() * (1 - 1e-5)
        assert count == 1 or squares[: count - 1].sum() < keep * squares.sum()


def test_a_change_of_nothing_stays_one() -> None:
    given = change("out", 3, scale=0.0)
    for options in ({"rank": 2}, {"keep": 0.5}):
        found = cut(given, **options)
        assert found.total == 0 and not np.any(delta(found.change))


def test_a_large_matrix_of_low_rank_is_decomposed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_WHOLE", 0)
    draw = np.random.default_rng(0)
    matrix = draw.standard_normal((70, 6), np.float32) @ draw.standard_normal((6, 90), np.float32)
    found = low_rank.decompose(matrix, 6)
    assert np.linalg.norm(delta(found.change) - matrix) <= 1e-6 * np.linalg.norm(matrix)
    assert found.kept == pytest.approx(found.total, rel=1e-6)


def test_subspace_iteration_keeps_what_the_singular_values_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_WHOLE", 0)
    draw = np.random.default_rng(0)
    (left, _), (right, _) = (np.linalg.qr(draw.standard_normal((size, 80))) for size in (80, 100))
    sizes = (np.arange(80) + 1.0) ** -0.5  # falls slowly: the hard case
    found = low_rank.decompose(((left * sizes) @ right.T).astype(np.float32), 8)
    assert found.change.rank == 8
    assert found.kept == pytest.approx(np.sum(sizes[:8] ** 2), rel=1e-4)
