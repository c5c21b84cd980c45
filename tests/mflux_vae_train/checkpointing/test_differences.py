"""Differences between runs name files and settings, in a readable length."""

from __future__ import annotations

from typing import Any

import pytest

from mflux_vae_train.checkpointing.differences import BY_FILE, MAX_TEXT, differences, file_differences, listed

A, B, C = ["a.png", "1", "a dog", ""], ["b.png", "2", "a dog", ""], ["c.png", "3", "a dog", "9"]


@pytest.mark.parametrize(
    ("before", "now", "texts"),
    [
        ([A, B], [A, B], []),
        ([A, B], [A, B, C], ["c.png is new"]),
        ([A, B, C], [A, C], ["b.png is gone"]),
        ([A, B], [A, ["b.png", "7", "a dog", ""]], ["b.png has other content"]),
        ([A], [["a.png", "1", "a cat", ""]], ["caption of a.png was 'a dog', is now 'a cat'"]),
        ([C], [["c.png", "3", "a dog", ""]], ["mask of c.png is gone"]),
        ([A], [["a.png", "1", "a dog", "5"]], ["mask of a.png is new"]),
        ([C], [["c.png", "3", "a dog", "5"]], ["mask of c.png is changed"]),
        ([A, B], [B, ["z.png", "1", "a dog", ""]], ["the order of the files", "a.png is now called z.png"]),
        ([A, B], [["a2.png", "1", "a dog", ""], B], []),  # the order is the same
        ([A, B], [["z.png", "1", "a cat", ""], B], ["caption of z.png was 'a dog', is now 'a cat'"]),
        ([["1.png", "x"], ["2.png", "x"]], [["1.png", "x"]], ["2.png is gone"]),
    ],
)
def test_files_that_differ(before: Any, now: Any, texts: Any) -> None:
    assert file_differences(before, now) == texts


def test_rows_explain_a_hash_and_are_not_compared() -> None:
    before = {"images": "e1", f"images{BY_FILE}": [A], "seed": 0}
    assert differences(before, {**before, f"images{BY_FILE}": [B]}) == []
    assert differences(before, {**before, "images": "e2", f"images{BY_FILE}": [B]}) == [
        "images was changed (b.png is new; a.png is gone)"
    ]
    for broken in (None, 5, [5], [[]], [[["a"]]], {"a": "b"}):
        changed = {**before, "images": "e2", f"images{BY_FILE}": broken}
        assert differences(changed, before) == ["images was 'e2', is now 'e1'"]
    assert differences(before, {**before, "seed": 1}, ignored={"seed"}) == []


def test_hashes_are_not_shown() -> None:
    one, other = "0609dd6b" * 2, "a" * 64
    for was, now in ((one, other), (None, other), ([one, one], [one, other])):
        assert differences({"base weights": was}, {"base weights": now}) == ["base weights changed"]
    assert differences({}, {"adapter to start from": one}) == ["adapter to start from (--lora_weights) changed"]
    assert differences({"prompt": "sks"}, {"prompt": one[:8]}) == ["prompt was 'sks', is now '0609dd6b'"]


def test_long_values_are_cut_around_the_difference() -> None:
    long = "a photo of a dog " * 30
    (text,) = differences({"prompt": long + "asleep"}, {"prompt": long + "awake"})
    assert "asleep" in text and "awake" in text and len(text) < 200


def test_a_long_list_is_cut() -> None:
    texts = [f"setting_{number} was {number}, is now {number + 1}" for number in range(50)]
    assert listed(texts[:2]) == "; ".join(texts[:2])
    assert listed(texts).endswith("more") and len(listed(texts)) < MAX_TEXT + 20
    assert listed(["x" * 500]) == "x" * 500
