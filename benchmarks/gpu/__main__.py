"""Measure on a Mac or an NVIDIA card what this project claims of them; print one table.

    python -m benchmarks.gpu [--json FILE] [--only NAME] [--vae PATH] [--quick]

Needs 8 GB, no network and no other package, and should take five minutes; it was not run on a GPU yet. Each section
runs in a separate process: a section that fails or runs out of memory is a row, and the next one starts. On a CPU the
sections run the code for GPUs at small sizes, to test it; those are no figures of a GPU.

| section | question |
|---|---|
| convolution, autoencoder | does half precision lose more than its rounding (Metal's Winograd convolution does)? |
| weight gradient | is that of a convolution faster by parts than by MLX? |
| activations, text encoders | the same for activations, CLIP and T5; attention with masks |
| quantised products | are they faster by MLX's kernel or dequantised first, and do they repeat to the bit? |
| attention | does the backward pass keep scores? |
| training, decoding | is the peak of memory near the estimate? how long does an update take? |
| sampling | is a denoiser faster if it is compiled as a whole? |
| small graphs, sizes | do many graphs and convolutions fill MLX's caches on CUDA? |
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.harness.process import ImplementationFailed, Process
from benchmarks.harness.rows import Implementation
from benchmarks.harness.table import headline
from mflux_vae.kernels.quantized import PRODUCT_VARIABLE
from mflux_vae.runtime import device


@dataclass(frozen=True, kw_only=True)
class Section:
    """Part of the measurement.

    Attributes:
        build: function of a module in this folder that returns a `Work`.
        share: seconds that it may take on a laptop's GPU, for the remaining time.
        environment: additional environment variables.
    """

    name: str
    build: str
    share: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Figures of a section, or why there are none."""

    name: str
    seconds: float
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        figures = [
            {"name": name, "value": _finite(value), "limit": _finite(limit), "met": _met(value, limit)}
            for name, (value, limit) in self.figures.items()
        ]
        return {"section": self.name, "seconds": self.seconds, "failure": self.failure, "figures": figures}


SECTIONS = (
    Section(name="convolution", build="numbers:convolution"),
    Section(name="weight gradient", build="numbers:weight_gradient", share=5),
    Section(name="activations", build="numbers:activations", share=5),
    Section(name="attention", build="memory:attention", share=5),
    Section(
        name="quantised products, MLX's kernel", build="products:quantized", environment={PRODUCT_VARIABLE: "native"}
    ),
    Section(
        name="quantised products, dequantised", build="products:quantized", environment={PRODUCT_VARIABLE: "dense"}
    ),
    Section(name="autoencoder", build="numbers:autoencoder", share=60),
    Section(name="text encoders", build="numbers:text_encoders", share=20),
    Section(name="decoding", build="memory:decoding", share=20),
    Section(name="training", build="memory:training", share=90),
    Section(name="sampling", build="memory:sampling"),
    Section(name="small graphs", build="memory:small_graphs", share=30, environment={"MLX_MAX_OPS_PER_BUFFER": "20"}),
    Section(name="sizes", build="memory:sizes", share=20),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a section failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a JSON file")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a section's name")
    parser.add_argument("--vae", metavar="PATH", help="weights of an autoencoder (default: random ones)")
    parser.add_argument("--quick", action="store_true", help="small sizes: tests the script (always on a CPU)")
    given = parser.parse_args(argv)
    chosen = [one for one in SECTIONS if not given.only or any(part in one.name for part in given.only)]
    if not chosen:
        parser.error(f"no section matches {', '.join(given.only)}; sections: {', '.join(s.name for s in SECTIONS)}")
    vae = None if given.vae is None else str(Path(given.vae).resolve())
    if vae is not None and not Path(vae).exists():
        parser.error(f"--vae {given.vae}: no such file or folder")
    machine = f"{headline(os.cpu_count() or 1)}\n{', '.join(f'{k} {v}' for k, v in mx.device_info().items())}"
    if device.is_cpu():
        machine += "\nno GPU: the code for GPUs ran on the CPU at small sizes; these are no figures of a GPU"
    print(machine, file=sys.stderr, flush=True)
    results = measure(chosen, quick=given.quick or device.is_cpu(), vae=vae)
    print(f"{machine}\n\n{table(results)}")
    if given.json is not None:
        report = {
            "machine": machine,
            "device": {name: str(value) for name, value in mx.device_info().items()},
            "gpu": not device.is_cpu(),
            "quick": given.quick or device.is_cpu(),
            "sections": [result.to_dict() for result in results],
        }
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(result.failure for result in results))


def measure(sections: Sequence[Section], *, quick: bool, vae: str | None = None) -> list[Result]:
    """Run the sections one after the other, and print the progress. Ctrl-C ends them; what was measured remains."""
    results: list[Result] = []
    began, left = time.monotonic(), sum(section.share for section in sections)
    pace = 1.0
    for number, section in enumerate(sections, start=1):
        about = "" if quick else f", about {pace * left:.0f} s left"
        print(f"[{number}/{len(sections)}] {section.name}{about} ...", file=sys.stderr, flush=True)
        try:
            results.append(run(section, quick=quick, vae=vae))
        except KeyboardInterrupt:
            return results + [Result(name=one.name, seconds=0, failure="interrupted") for one in sections[number - 1 :]]
        print(f"    {results[-1].failure or f'{results[-1].seconds:.0f} s'}", file=sys.stderr, flush=True)
        left -= section.share
        pace = (time.monotonic() - began) / (sum(one.share for one in sections) - left)
    return results


def run(section: Section, *, quick: bool, vae: str | None = None) -> Result:
    """Measure one section in a separate process."""
    settings = {"quick": quick} | ({"weights": vae} if section.name == "autoencoder" else {})
    # compilation for a CPU takes a minute
    compiled = {"MLX_DISABLE_COMPILE": "1"} if device.is_cpu() else {}
    side = Implementation(
        name=section.name,
        build=f"benchmarks.gpu.{section.build}",
        settings=settings,
        environment={**compiled, **section.environment},
    )
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, Process(side, os.cpu_count() or 1) as process:
            process.output(Path(folder) / "figures.npz")
            with np.load(Path(folder) / "figures.npz") as stored:
                figures = {name: (float(stored[name][0]), float(stored[name][1])) for name in stored.files}
    except ImplementationFailed as error:
        return Result(name=section.name, seconds=time.monotonic() - began, failure=f"failed: {error}")
    return Result(name=section.name, seconds=time.monotonic() - began, figures=figures)


def table(results: Sequence[Result]) -> str:
    """A Markdown table of all figures and failures."""
    lines = ["| section | figure | found | claimed |", "|---|---|---|---|"]
    for result in results:
        if result.failure:
            lines.append(f"| {result.name} | {result.failure} |  |  |")
        for name, (value, limit) in result.figures.items():
            met = _met(value, limit)
            claim = "" if met is None else f"at most {limit:g}{'' if met else ' (missed)'}"
            lines.append(f"| {result.name} | {name} | {value:.4g} | {claim} |")
    return "\n".join(lines)


def _finite(value: float) -> float | None:
    """For JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _met(value: float, limit: float) -> bool | None:
    """Whether a claim holds; None without a claim."""
    return None if math.isnan(limit) else value <= limit


if __name__ == "__main__":
    sys.exit(main())
