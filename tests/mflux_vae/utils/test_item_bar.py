"""A bar over items does not count its first ones, which may include loading and compiling."""

from __future__ import annotations

import io

import pytest

from mflux_vae.utils import item_bar as module
from mflux_vae.utils.item_bar import item_bar


def test_the_first_items_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with item_bar(total=40, unit="image", file=io.StringIO()) as bar:
        assert bar.format_dict["rate"] == 0 and "?" in str(bar)
        now[0] = 300.0
        bar.update(10)
        assert bar.format_dict["rate"] == 0
        now[0] = 305.0
        bar.update(10)
        assert bar.format_dict["rate"] == pytest.approx(2.0) and "<00:10" in str(bar)


def test_iterating() -> None:
    assert list(item_bar(["a", "b"], total=5, initial=3, file=io.StringIO())) == ["a", "b"]
