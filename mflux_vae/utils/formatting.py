"""Format bytes and counts. GB and MB are 10^9 and 10^6 bytes."""

from __future__ import annotations

from collections.abc import Sequence

GB = 10**9


def size_text(number: float) -> str:
    """Format bytes: "1.2 GB", "35 MB", "0.42 MB"."""
    return f"{number / GB:.1f} GB" if number >= GB / 2 else f"{number / 1e6:.{0 if number >= 1e7 else 2}f} MB"


def count_text(count: int, noun: str) -> str:
    """Format a count: "1 image", "1,200 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_few(items: Sequence[str], count: int = 3) -> str:
    """List the first items: "a, b, c and 263 more"."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more:,} more" if more > 0 else "")
