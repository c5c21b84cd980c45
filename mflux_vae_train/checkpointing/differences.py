"""What differs between two runs, in words: settings by their values, files by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

BY_FILE = " by file"
"""``NAME by file`` lists the files that the hash `NAME` of a fingerprint covers: rows of (name, content hash, caption,
mask hash), of which the last two may be missing. It explains a difference and is not compared."""

_HASH = re.compile(r"[0-9a-f]{16,64}")
_FLAGS = {
    "adapter to start from": " (--lora_weights)",
    "assistant": " (--assistant_lora)",
    "initial weights": " (--init_from, --network_config)",
}
"""By name of a hash: the flags that choose what it covers."""

MAX_VALUE, MAX_TEXT = 48, 130
"""Characters of a value, and of all differences together, in a message."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, ignored: Collection[str] = ()) -> list[str]:
    """One text for each difference between two fingerprints.

    Args:
        ignored: names that are not compared.
    """
    now = json.loads(json.dumps(dict(now)))  # as in a file: tuples become lists
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [_text(name, before, now) for name in names if name not in ignored and not name.endswith(BY_FILE)]


def _text(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    sides = [file_rows(side, name) for side in (before, now)]
    if None not in sides and (texts := file_differences(sides[0] or [], sides[1] or [])):
        return f"{name} was changed ({listed(texts, 100)})"
    if any(_is_hash(side.get(name)) for side in (before, now)):
        return f"{name}{_FLAGS.get(name, '')} changed"
    was, now_is = _excerpts(repr(before.get(name)), repr(now.get(name)))
    return f"{name} was {was}, is now {now_is}"


def _is_hash(value: object) -> bool:
    """Whether a value is a hash, or a list of hashes: it differs, and its digits explain nothing."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_hash, value))
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def file_rows(fingerprint: Mapping[str, Any], name: str) -> list[list[str]] | None:
    """The rows that explain a hash; None if there are none, or they are broken."""
    rows = fingerprint.get(name + BY_FILE)
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return None
    return rows if all(isinstance(text, str) for row in rows for text in row) else None


def file_differences(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> list[str]:
    """One text for each file that is new, gone or changed, and one for the order. New names alone do not count."""
    then, later = ({row[0]: (*row[1:], "", "", "")[:3] for row in side} for side in (before, now))
    old_names = {name: name for name in later if name in then}
    left = [name for name in then if name not in later]
    for name in (name for name in later if name not in then):
        if old := next((old for old in left if then[old][0] == later[name][0]), None):  # renamed
            left.remove(old)
            old_names[name] = old
    kept, texts = [name for name in later if name in old_names], []
    for name in kept:
        (content, caption, mask), (new_content, new_caption, new_mask) = then[old_names[name]], later[name]
        if content != new_content:
            texts.append(f"{name} has other content")
        if caption != new_caption:
            was, now_is = _excerpts(repr(caption), repr(new_caption))
            texts.append(f"caption of {name} was {was}, is now {now_is}")
        if mask != new_mask:
            texts.append(f"mask of {name} is {'new' if not mask else 'changed' if new_mask else 'gone'}")
    texts += [f"{name} is new" for name in later if name not in old_names]
    texts += [f"{name} is gone" for name in left]
    order = [old_names[name] for name in kept]
    if order != [name for name in then if name in order]:
        texts.append("the order of the files")
        texts += [f"{old_names[name]} is now called {name}" for name in kept if name != old_names[name]]
    return texts


def listed(texts: Sequence[str], length: int = MAX_TEXT) -> str:
    """The first texts that fit into this many characters, at least one: "a; b and 3 more"."""
    count, used = 0, 0
    while count < len(texts) and (not count or used + len(texts[count]) <= length):
        used += len(texts[count])
        count += 1
    more = len(texts) - count
    return "; ".join(texts[:count]) + (f" and {more:,} more" if more else "")


def _excerpts(one: str, other: str) -> tuple[str, str]:
    """Two texts that differ, shortened to the characters around the first difference."""
    if max(len(one), len(other)) <= MAX_VALUE:
        return one, other
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - MAX_VALUE // 3)
    cut = [text[start : start + MAX_VALUE] + ("..." if len(text) > start + MAX_VALUE else "") for text in (one, other)]
    return f"{'...' if start else ''}{cut[0]}", f"{'...' if start else ''}{cut[1]}"
