"""Lists in messages stay short, and complete where they can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import first_few, shortened, summarize

ITEMS = st.lists(st.text(max_size=300), max_size=30)


@given(st.lists(st.tuples(st.text(max_size=20), ITEMS), max_size=6))
def test_a_summary_has_a_limit(groups: list[tuple[str, list[str]]]) -> None:
    text = summarize(groups, 220)
    assert len(text) <= 220
    assert all(label in text for label, items in groups if items)


def test_a_summary_is_complete_if_it_fits() -> None:
    assert summarize([("missing ", ["a", "b"]), ("unknown ", []), ("", ["c is 1"])]) == "missing a, b; c is 1"
    assert summarize([("missing ", [f"a{i}" for i in range(2000)])]) == "missing a0, a1, a2 and 1,997 more"


@given(st.text(max_size=300), st.integers(12, 200))
def test_a_long_text_loses_its_middle(text: str, width: int) -> None:
    short = shortened(text, width)
    assert short == text if len(text) <= width else len(short) == width and "..." in short
    assert len(first_few([text] * 9, 2, width)) <= 2 * width + len(",  and 7 more")


def test_no_message_of_an_error_is_longer_than_a_page() -> None:
    assert len(str(WeightsError("x" * 100_000))) <= 1000
