"""The result of an evaluation: a document for evaluation.json, and a table for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mflux_vae_train.dreambooth.evaluation.recommend import Recommendation, Row, overall, recommend
from mflux_vae_train.evaluation.evaluator import Measure
from mflux_vae_train.evaluation.score import Score

DOCUMENT, CHART, SHEET = "evaluation.json", "fidelity.png", "pictures.png"
"""Files in the folder `evaluation` of a run."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    Attributes:
        evaluator: its name.
        goals: values of real images, see `Evaluator.goals`.
        settings: how the images were drawn, for the document.
        base: scores of the untrained model.
        rows: scores of the adapters, in the order of updates.
    """

    evaluator: str
    measures: Sequence[Measure]
    goals: Mapping[str, float]
    settings: Mapping[str, Any]
    base: Row
    rows: Sequence[Row]

    def overall(self, row: Row) -> Score:
        return overall(row, self.base, self.measures, self.goals)

    def recommendation(self) -> Recommendation:
        return recommend(self.rows, self.base, self.measures, self.goals)

    def document(self) -> dict[str, Any]:
        """Plain values. `overall` of a row and the recommendation are explained in `recommend`."""
        found = self.recommendation()
        return {
            "evaluator": self.evaluator,
            "settings": dict(self.settings),
            "measures": [asdict(measure) for measure in self.measures],
            "goals": dict(self.goals),
            "untrained": _plain(self.base),
            "rows": [{**_plain(row), "overall": asdict(self.overall(row))} for row in self.rows],
            "recommended": None if found.row is None else {"checkpoint": found.row.name, "scale": found.row.scale},
            "reason": found.reason,
        }

    def table(self) -> str:
        """The scores with standard errors, the goals, and the recommendation."""
        chosen = self.recommendation()
        headings = ["checkpoint", "scale", *(measure.heading for measure in self.measures), "overall", ""]
        goals = [f"{self.goals[one.name]:.2f}" if one.name in self.goals else "" for one in self.measures]
        lines = [headings, ["real images", "", *goals, "", ""]]
        for row in (self.base, *self.rows):
            scores = [_text(row.scores[measure.name]) for measure in self.measures]
            trained = row is not self.base
            mark = "<- recommended" if row is chosen.row else ""
            product = _text(self.overall(row)) if trained else ""
            lines.append([row.name, f"{row.scale:g}" if trained else "", *scores, product, mark])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        notes = [f"{measure.heading}: {measure.text}" for measure in self.measures]
        return "\n".join([*texts, "", *notes, "", f"recommended: {chosen.reason}"])


def _plain(row: Row) -> dict[str, Any]:
    scores = {name: asdict(score) for name, score in row.scores.items()}
    return {"label": row.label, "checkpoint": row.name, "update": row.update, "scale": row.scale, "scores": scores}


def _text(score: Score) -> str:
    return f"{score.value:.3f} ± {score.error:.3f}"
