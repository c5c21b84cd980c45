"""A progress bar over items of one kind, such as images."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import Any


def item_bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar whose remaining time leaves out the first items, which may include compiling and loading.

    Args:
        items: to iterate over; None to call `update` with the number of items done at once.
        options: of tqdm.
    """
    return _bar_class()(items, **options)


@cache
def _bar_class() -> Any:
    from tqdm import tqdm

    class ItemBar(tqdm):
        _first: tuple[float, float] | None = None

        def update(self, n: float | None = 1) -> bool | None:
            if self._first is None and n:
                self._first = time.monotonic(), self.n + n
            return super().update(n)

        @property
        def format_dict(self) -> Any:
            values, first = super().format_dict, self._first
            done = 0.0 if first is None else values["n"] - first[1]
            # 0: unknown
            return {**values, "rate": done / max(time.monotonic() - first[0], 1e-9) if first and done > 0 else 0}

    return ItemBar
