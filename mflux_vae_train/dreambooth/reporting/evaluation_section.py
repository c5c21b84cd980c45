"""The evaluation of a run in its report: recommendation, scores, chart and images."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from mflux_vae.errors import ImageError, WeightsError
from mflux_vae.images import load_image
from mflux_vae.weights.formats.files import read_json, write_text
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.monitoring.report.page import Section, image_element, with_section

NAME, BEFORE = "evaluation", "data"
"""Of the section, and of the one that follows it."""

_LARGEST = 1200


def evaluation_section(root: Path) -> Section:
    """The section about the last evaluation of the run in a folder; empty if there is none."""
    folder = RunFolder(root).evaluation
    try:
        found = read_json(folder / "evaluation.json")
        body = f"<p><b>Recommended:</b> {escape(found['reason'])}.</p>{_table(found)}"
        for name, caption in (("fidelity.png", "subject fidelity over prompt fidelity"), ("pictures.png", "images")):
            body += f"<h3>{caption.capitalize()}</h3>"
            body += image_element(load_image(folder / name), largest=_LARGEST, caption=caption)
    except (WeightsError, ImageError, KeyError, TypeError):  # none yet, or of another version
        body = ""
    return Section(name=NAME, title="Evaluation", body=body, note="Mean and standard error; see evaluation.json.")


def update_report(root: Path) -> None:
    """Put the evaluation into the report of a run, if it has one."""
    report = RunFolder(root).report
    if report.is_file():
        html = report.read_text(encoding="utf-8", errors="replace")
        write_text(report, with_section(html, evaluation_section(root), before=BEFORE))


def _table(found: Any) -> str:
    """A row for each checkpoint and scale; the recommended one is bold."""
    measures, chosen = found["measures"], found["recommended"]
    heads = "".join(f'<th scope="col" title="{escape(one["text"])}">{escape(one["heading"])}</th>' for one in measures)
    rows = []
    for row in (found["untrained"], *found["rows"]):
        scores = [row["scores"][one["name"]] for one in measures] + ([row["overall"]] if "overall" in row else [])
        cells = "".join(f"<td>{score['value']:.3f} ± {score['error']:.3f}</td>" for score in scores)
        bold = chosen is not None and (row["checkpoint"], row["scale"]) == (chosen["checkpoint"], chosen["scale"])
        rows.append(f'<tr{" class=set" if bold else ""}><th scope="row">{escape(row["label"])}</th>{cells}</tr>')
    return (
        f'<div class="scores"><table><tr><th scope="col">checkpoint</th>{heads}<th scope="col">overall</th></tr>'
        f"{''.join(rows)}</table></div>"
    )
