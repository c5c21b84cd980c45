"""The curves of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.monitoring.report.charts import Chart, draw
from mflux_vae_train.monitoring.report.curves import Curve


def charts(records: Sequence[Mapping[str, Any]], max_grad_norm: float, total: int) -> str:
    """Everything that was measured, as HTML: what is known well, each with a sentence, then whatever else there is.

    Args:
        records: lines of the metrics file.
        total: updates of the whole run.
    """
    if not records:
        return ""
    losses = [name for name in ("instance_loss", "prior_loss") if name in records[0]] or ["loss"]
    levels = sorted(
        {name for record in records for name in record if name.startswith(loss_by_noise.PREFIX)},
        key=lambda name: int(name.removeprefix(loss_by_noise.PREFIX).split("-")[0]),
    )
    # an optimizer that finds its own rate is given a mere factor
    found = any("effective_rate" in record for record in records)
    rate = ("effective_rate", "found by the optimizer") if found else ("learning_rate", "rate")
    shown = [
        Chart(
            title="Loss",
            curves=[_curve(records, name, name.removesuffix("_loss")) for name in losses],
            note="Each update's faintly, for its noise is drawn anew, and the average over a twentieth of the run.",
            logarithmic=False,
            wide=True,
        ),
        Chart(
            title="Loss by noise level",
            curves=[_curve(records, name, _percent(name), faint=False) for name in levels],
            note="Of the subject's pictures, averaged: little noise teaches details, much noise the composition.",
            logarithmic=False,
            ordered=True,
            wide=True,
        ),
        Chart(title="Learning rate", curves=[_curve(records, *rate, smooth=False)], logarithmic=False),
        Chart(
            title="Gradient",
            curves=[_curve(records, "grad_norm", "norm")],
            note="Before clipping.",
            line=(max_grad_norm, "clipped above"),
        ),
        Chart(
            title="Size of an update",
            curves=[_curve(records, "update_size", "change", smooth=False)],
            note="Norm of the change as a share of the norm of all that is trained.",
        ),
    ]
    known = {*losses, *levels, "loss", "learning_rate", "effective_rate", "grad_norm", "update_size"}
    others = list(dict.fromkeys(name for record in records for name in record))
    for name in others:
        if name not in known and name not in ("update", "seconds", "samples", "memory_gb"):
            shown.append(Chart(title=name.replace("_", " ").capitalize(), curves=[_curve(records, name, "value")]))
    memory = _curve(records, "memory_gb", "GB", smooth=False)
    timed = [record for record in records if record.get("samples") and record["seconds"] > 0]
    speed = [record["samples"] / record["seconds"] for record in timed]
    updates = [record["update"] for record in timed]
    shown += [
        Chart(title="Images per second", curves=[Curve(name="speed", updates=updates, values=speed)]),
        Chart(
            title="Memory",
            curves=[memory],
            note="MLX's peak so far.",
            also=(0.0,),
            logarithmic=False,
        ),
    ]
    drawn = [draw(chart, total=total) for chart in shown if any(len(curve.values) for curve in chart.curves)]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _percent(metric: str) -> str:
    return metric.removeprefix(loss_by_noise.PREFIX).replace("-", "–") + " % noise"


def _curve(records: Sequence[Mapping[str, Any]], metric: str, name: str, **options: bool) -> Curve:
    present = [record for record in records if metric in record]
    return Curve(
        name=name,
        updates=[record["update"] for record in present],
        values=[record[metric] for record in present],
        **options,
    )
