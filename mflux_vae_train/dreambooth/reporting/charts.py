"""The charts of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mflux_vae_train.dreambooth.best_adapter import MEASURED
from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.dreambooth.reporting import held_out
from mflux_vae_train.monitoring.report.charts import Chart, draw
from mflux_vae_train.monitoring.report.curves import Curve

_KNOWN = {
    *("update", "seconds", "samples", "memory_gb", "loss", "instance_loss", "prior_loss"),
    *("learning_rate", "effective_rate", "grad_norm", "update_size", held_out.METRIC, MEASURED),
}


def charts(records: Sequence[Mapping[str, Any]], max_grad_norm: float, total: int) -> str:
    """HTML with a chart of every metric; metrics without a chart here get a plain one.

    Args:
        records: lines of the metrics file.
        total: updates in the whole run.
    """
    if not records:
        return ""
    metrics = list(dict.fromkeys(name for record in records for name in record))
    losses: list[str] = [name for name in ("instance_loss", "prior_loss") if name in metrics] or ["loss"]
    bins = {name: name.removeprefix(loss_by_noise.PREFIX) for name in metrics if name.startswith(loss_by_noise.PREFIX)}
    # an optimizer that estimates the rate multiplies it by the scheduled one
    rate = ("effective_rate", "found by the optimizer") if "effective_rate" in metrics else ("learning_rate", "rate")
    others = [name for name in metrics if name not in _KNOWN | bins.keys()]
    timed = [record for record in records if record.get("samples") and record.get("seconds", 0) > 0]
    speeds = [{"update": record["update"], "speed": record["samples"] / record["seconds"]} for record in timed]
    shown = [
        Chart(
            title="Loss",
            curves=[_curve(records, name, name.removesuffix("_loss")) for name in losses],
            note="Faint: each update, with new noise. Solid: running average over a twentieth of the run.",
            logarithmic=False,
            wide=True,
        ),
        Chart(
            title="Held-out loss",
            curves=[_curve(held_out.measured_records(records), held_out.METRIC, "instance loss", smooth=False)],
            note="On images that are not trained, always with the same noise. It rises when the run learns the training"
            " images by heart.",
            logarithmic=False,
            wide=True,
        ),
        Chart(
            title="Loss by noise level",
            curves=[
                _curve(records, name, percent.replace("-", "–") + " % noise", faint=False)
                for name, percent in sorted(bins.items(), key=lambda item: int(item[1].split("-")[0]))
            ],
            note="Instance images, averaged. Low noise levels train details, high ones composition.",
            logarithmic=False,
            ordered=True,
            wide=True,
        ),
        Chart(title="Learning rate", curves=[_curve(records, *rate, smooth=False)], logarithmic=False),
        Chart(
            title="Gradient norm",
            curves=[_curve(records, "grad_norm", "norm")],
            note="Before clipping.",
            line=(max_grad_norm, "clipped above"),
        ),
        Chart(
            title="Update size",
            curves=[_curve(records, "update_size", "change", smooth=False)],
            note="Norm of the change divided by the norm of the trained weights.",
        ),
        *(Chart(title=name.replace("_", " ").capitalize(), curves=[_curve(records, name, "value")]) for name in others),
        Chart(title="Images per second", curves=[_curve(speeds, "speed", "speed")]),
        Chart(
            title="Peak memory",
            curves=[_curve(records, "memory_gb", "GB", smooth=False)],
            note="Peak of MLX so far.",
            also=(0.0,),
            logarithmic=False,
        ),
    ]
    drawn = [draw(chart, total=total) for chart in shown if any(len(curve.values) for curve in chart.curves)]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _curve(records: Sequence[Mapping[str, Any]], metric: str, name: str, **options: bool) -> Curve:
    points = [(record["update"], record[metric]) for record in records if metric in record]
    return Curve(name=name, updates=[u for u, _ in points], values=[value for _, value in points], **options)
