"""Which row is recommended, on scores with a known answer."""

from __future__ import annotations

import pytest

from mflux_vae_train.dreambooth.evaluation.recommend import Row, overall, recommend
from mflux_vae_train.evaluation.evaluator import Measure
from mflux_vae_train.evaluation.score import Score

MEASURES = (
    Measure(name="subject_fidelity", heading="DINO", text="", role="gained"),
    Measure(name="prompt_fidelity", heading="CLIP-T", text="", role="kept"),
    Measure(name="prior_preservation", heading="PRES", text="", role="kept", worst=1.0),
    Measure(name="diversity", heading="DIV", text="", role="shown"),
)
GOALS = {"subject_fidelity": 0.8}


def row(update: int, subject: float, prompts: float, prior: float, *, scale: float = 1.0, error: float = 0.005) -> Row:
    values = {"subject_fidelity": subject, "prompt_fidelity": prompts, "prior_preservation": prior, "diversity": update}
    scores = {name: Score(value=value, error=error) for name, value in values.items()}
    return Row(update=update, name=str(update), scale=scale, scores=scores)


BASE = row(0, 0.4, 0.32, 0.4, scale=0)


def chosen(*rows: Row) -> Row | None:
    return recommend(rows, BASE, MEASURES, GOALS).row


def test_overall_is_the_product_of_what_was_gained_and_kept() -> None:
    half = row(100, 0.6, 0.16, 0.7)  # half of the way to real images, half of the prompts, half of the prior
    assert overall(half, BASE, MEASURES, GOALS).value == pytest.approx(1 / 8)
    assert overall(row(100, 0.9, 0.4, 0.3), BASE, MEASURES, GOALS).value == 1  # limited
    assert overall(row(100, 0.3, 0.32, 0.4), BASE, MEASURES, GOALS).value == 0
    certain, vague = (overall(row(1, 0.6, 0.3, 0.45, error=error), BASE, MEASURES, GOALS) for error in (0, 0.01))
    assert certain.error == 0 and vague.error > 0.01


def test_an_adapter_that_forgets_is_not_recommended() -> None:
    weak, good, overtrained = row(50, 0.45, 0.32, 0.41), row(100, 0.7, 0.31, 0.45), row(200, 0.72, 0.2, 0.68)
    assert chosen(weak, good, overtrained) is good


def test_within_one_error_fewer_updates_are_recommended() -> None:
    early, best = row(100, 0.70, 0.31, 0.42), row(200, 0.704, 0.31, 0.42)
    assert chosen(best, early) is early
    assert "standard error" in recommend([early, best], BASE, MEASURES, GOALS).reason
    assert chosen(row(100, 0.70, 0.31, 0.42, error=1e-6), row(200, 0.704, 0.31, 0.42, error=1e-6)).update == 200


def test_before_the_subject_is_learned_the_best_is_recommended() -> None:
    rows = [row(50, 0.50, 0.32, 0.4, error=0.02), row(100, 0.51, 0.32, 0.4, error=0.02)]
    found = recommend(rows, BASE, MEASURES, GOALS)
    assert found.row is rows[1] and "more updates" in found.reason


def test_of_one_checkpoint_the_scale_next_to_1_is_recommended() -> None:
    low, one, high = (row(100, 0.7, 0.31, 0.42, scale=scale) for scale in (0.6, 1.0, 1.2))
    assert chosen(low, one, high) is one


def test_nothing_is_recommended_if_nothing_is_learned() -> None:
    found = recommend([row(50, 0.4, 0.32, 0.4), row(100, 0.402, 0.32, 0.4)], BASE, MEASURES, GOALS)
    assert found.row is None and "more updates" in found.reason
    found = recommend([row(50, 0.8, 0.0, 1.0), row(100, 0.8, 0.0, 1.0)], BASE, MEASURES, GOALS)
    assert found.row is None and "fewer updates" in found.reason


def test_a_measure_without_room_does_not_count() -> None:
    base = row(0, 0.9, 0.32, 1.0, scale=0)  # the subject is drawn already, and the class is the subject
    assert overall(row(10, 0.5, 0.16, 0.2), base, MEASURES, GOALS).value == pytest.approx(0.5)
