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


def with_article(noun: str) -> str:
    """A noun, or a name, after its indefinite article: "a Mapping", "an object"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def first_few(items: Sequence[str], count: int = 3, width: int = 80) -> str:
    """List the first items, long ones shortened: "a, b, c and 263 more"."""
    more = len(items) - count
    shown = ", ".join(shortened(item, width) for item in items[:count])
    return shown + (f" and {more:,} more" if more > 0 else "")


def shortened(text: str, width: int) -> str:
    """Text of at most `width` characters; longer texts lose their middle."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def summarize(groups: Sequence[tuple[str, Sequence[str]]], limit: int = 220) -> str:
    """List the first items of each group that has any, in at most `limit` characters: "missing a, b; unknown c".

    Args:
        groups: label and items; at most six groups with labels of at most 20 characters.
    """
    text = ""
    for count, width in ((3, 100), (2, 100), (2, 60), (1, 60), (1, 30), (1, 12)):
        text = "; ".join(f"{label}{first_few(items, count, width)}" for label, items in groups if items)
        if len(text) <= limit:
            break
    return text


def short_name(name: str) -> str:
    """A file name in one line of readable length."""
    return shortened("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name), 60)


def first_names(names: Sequence[str], count: int = 3) -> str:
    """List the first file names, each by `short_name`."""
    return first_few([short_name(name) for name in names], count)
