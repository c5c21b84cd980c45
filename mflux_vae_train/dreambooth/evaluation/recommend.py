"""Choose a checkpoint and a scale.

Training should make the subject recognisable and lose nothing else. Each measure that counts becomes a fraction:

- *gained*: (value - untrained) / (real images - untrained), for subject fidelity;
- *kept*: (value - worst) / (untrained - worst), for prompt fidelity and prior preservation;

both limited to [0, 1]. `overall` is their product, as in DreamBench++ (Peng et al. 2024), which ranks by concept
preservation times prompt following. A product, unlike a mean, is low if any factor is, and unlike limits for single
measures it ranks adapters that all forget something; unlike raw values, fractions of measures with different ranges
weigh alike.

Among all rows within one standard error of the highest product, the one with the fewest updates is recommended, then
the one with the scale nearest to 1: the one-standard-error rule (Breiman et al. 1984, section 3.4.3), because the order
of rows this close is chance, and a shorter training forgets less that nothing here measures. While the subject is not
learned halfway (`LEARNED`), there is no reason to stop early, and the highest product is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mflux_vae_train.evaluation.evaluator import Measure
from mflux_vae_train.evaluation.score import Score

LEARNED = 0.5
"""Fraction gained of the way from the untrained model to real images."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one adapter at one scale.

    Attributes:
        update: number of updates after which the adapter was saved; 0 for the untrained model.
        name: of the checkpoint.
        scale: factor of the adapter; 0 for the untrained model.
    """

    update: int
    name: str
    scale: float
    scores: Mapping[str, Score]

    @property
    def label(self) -> str:
        name = f"step {self.name}" if self.name.isdecimal() else self.name
        return name if self.scale in (0, 1) else f"{name} at {self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """
    Attributes:
        row: None if no adapter draws the subject.
        reason: one sentence.
    """

    row: Row | None
    reason: str


def overall(row: Row, base: Row, measures: Sequence[Measure], goals: Mapping[str, float]) -> Score:
    """Product of the fractions of all measures that count, with its standard error."""
    fractions = []
    for measure in measures:
        if measure.role == "shown":
            continue
        before, score = base.scores[measure.name].value, row.scores[measure.name]
        start, end = (before, goals[measure.name]) if measure.role == "gained" else (measure.worst, before)
        if (measure.role == "gained" and end <= start) or end == start:
            continue  # nothing to gain or to lose
        fraction = (score.value - start) / (end - start)
        fractions.append(Score(value=min(max(fraction, 0.0), 1.0), error=abs(score.error / (end - start))))
    value = math.prod(each.value for each in fractions)
    parts = [each.error * math.prod(other.value for other in fractions if other is not each) for each in fractions]
    return Score(value=value, error=math.hypot(*parts))


def recommend(
    rows: Sequence[Row], base: Row, measures: Sequence[Measure], goals: Mapping[str, float]
) -> Recommendation:
    """The row to use, see above."""
    products = {id(row): overall(row, base, measures, goals) for row in rows}
    best = max(rows, key=lambda row: (products[id(row)].value, -row.update))
    highest = products[id(best)]
    gained = [one for one in measures if one.role == "gained"]
    if highest.value <= highest.error:
        learned = max((overall(row, base, gained, goals) for row in rows), key=lambda score: score.value)
        if learned.value <= learned.error:
            why = "no checkpoint draws the subject more often than the untrained model: train for more updates"
        else:
            why = (
                "every checkpoint that draws the subject forgot the rest: train for fewer updates or with a lower rate"
            )
        return Recommendation(row=None, reason=why)
    is_learned = overall(best, base, gained, goals).value >= LEARNED
    near = [row for row in rows if products[id(row)].value >= highest.value - highest.error] if is_learned else [best]
    row = min(near, key=lambda row: (row.update, abs(row.scale - 1), row.scale))
    found = f"{row.label} (overall {products[id(row)].value:.2f} ± {products[id(row)].error:.2f})"
    if row is best:
        advice = "" if is_learned else "; the subject is not learned halfway yet: train for more updates"
        return Recommendation(row=row, reason=f"{found} has the highest product of what it gained and kept{advice}")
    why = "after fewer updates" if row.update < best.update else "at a scale nearer to 1"
    near_to = f"{highest.value:.2f} of {best.label}"
    return Recommendation(row=row, reason=f"{found} is within one standard error of the highest, {near_to}, {why}")
