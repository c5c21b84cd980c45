"""Registered data sets are found by name and checked; errors name them."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from mflux_vae.errors import ImageError, PluginError, SettingsError
from mflux_vae_train.vae.data import registry
from mflux_vae_train.vae.data.batches import Cached, open_data, split
from mflux_vae_train.vae.data.digits import Digits


def mine(*, size: int, channels: int, seed: int, count: int) -> Digits:
    return Digits(count, seed=seed, size=size, channels=channels)


def none(**_: Any) -> list[int]:
    return [1, 2]


class Floats(Digits):
    def item(self, index: int) -> np.ndarray:
        return super().item(index) / 255


def floats(*, size: int, channels: int, seed: int, count: int) -> Digits:
    return Floats(count, seed=seed, size=size, channels=channels)


def refusing(**_: Any) -> None:
    raise SettingsError("not in grey")


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [EntryPoint(name, f"{__name__}:{name}", registry.GROUP) for name in ("mine", "none", "floats", "refusing")]
    known.append(EntryPoint("broken", "no_such_module:data", registry.GROUP))

    def found(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == registry.GROUP
        return [entry for entry in known if name in (None, entry.name)]

    monkeypatch.setattr(registry, "entry_points", found)


def test_registered_data_get_size_channels_seed_and_count() -> None:
    source, test = open_data("mine", size=12, channels=3, seed=5, count=7)
    assert isinstance(source, Cached) and test is None and len(source) == 7
    np.testing.assert_array_equal(source.item(6), Digits(7, seed=5, size=12, channels=3).item(6))
    assert [len(part) for part in split(source, 0.3, 0)] == [5, 2]


@pytest.mark.parametrize(
    ("name", "error", "key"),
    [
        ("broken", PluginError, "no_such_module"),
        ("none", PluginError, "without size"),
        ("floats", PluginError, r"\(12, 12, 1\) of float64; expected .* uint8"),
        ("refusing", SettingsError, "not in grey"),
        ("absent", ImageError, r"digits, broken, floats, mine, none, refusing"),
    ],
)
def test_broken_data_sets_are_named(name: str, error: type[Exception], key: str) -> None:
    with pytest.raises(error, match=key):
        open_data(name, size=12, channels=1)
