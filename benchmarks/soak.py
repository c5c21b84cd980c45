"""Train 2,000 updates of the embedded pipeline; compare memory, time and open files of the first and last fifth.

    python -m benchmarks.soak [--updates N] [--output_dir FOLDER]

A thread samples the process each second; the first tenth is warm-up. Time is CPU time, so that other work on the
machine does not count. Measured on 2026-11-21, with 40 previews and 40 checkpoints: memory +1.7 % (0.42 GiB), CPU time
per update +5.6 %, 10 open files throughout.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.harness.machine import describe
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.registry import open_pipeline

GIB = 2**30


@dataclass(frozen=True)
class Look:
    """A moment of the run: updates made, seconds of the processor, bytes, open files."""

    update: int
    seconds: float
    resident: int
    active: int
    files: int


class Looking(threading.Thread):
    """Looks at this process each second until `done` is set."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics, self.done, self.looks = metrics, threading.Event(), list[Look]()

    def run(self) -> None:
        while not self.done.wait(1):
            try:
                with self.metrics.open("rb") as file:
                    update = sum(1 for _ in file)
                files = len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
            except FileNotFoundError:
                continue
            self.looks.append(Look(update, time.process_time(), _resident(), mx.get_active_memory(), files))


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # macOS: the peak alone can be had
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def trained(updates: int, out: Path) -> list[Look]:
    """The run, as it was seen."""
    settings = DreamBoothSettings(
        model="tiny",
        instance_data_dir=str(Path(tiny.__file__).parent / "example"),
        instance_prompt="a photo of xyz star",
        output_dir=str(out),
        max_train_steps=updates,
        gradient_accumulation_steps=1,
        num_class_images=10,
        num_validation_images=2,
        validation_steps=max(1, updates // 40),
        checkpointing_steps=max(1, updates // 40),
    )
    looking = Looking(out / "metrics.jsonl")
    looking.start()
    try:
        DreamBooth(open_pipeline("tiny")).train(settings)
    finally:
        looking.done.set()
        looking.join()
    return looking.looks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000, metavar="N")
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", help="(default: one that is deleted)")
    given = parser.parse_args()
    logging.getLogger("mflux_vae_train").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        looks = trained(given.updates, given.output_dir or Path(folder) / "out")
    first = [look for look in looks if 0.1 <= look.update / given.updates < 0.3]
    last = [look for look in looks if 0.8 <= look.update / given.updates < 1]
    if min(len(first), len(last)) < 5:
        raise SystemExit("too short a run to say anything: give more --updates")
    print(describe())
    print("| | first fifth | last fifth | grows by | allowed |\n|---|---|---|---|---|")
    kept = True
    for name, before, after, unit, allowed in (
        ("resident memory, GiB", _mean(first, "resident"), _mean(last, "resident"), GIB, 0.05),
        ("MLX's memory, GiB", _mean(first, "active"), _mean(last, "active"), GIB, 0.05),
        ("processor's seconds per update", _pace(first), _pace(last), 1, 0.1),
        ("open files, at most", max(x.files for x in first), max(x.files for x in last), 1, 0.0),
    ):
        growth = after / before - 1
        kept = kept and growth <= allowed
        print(f"| {name} | {before / unit:.4g} | {after / unit:.4g} | {growth:+.1%} | {allowed:.0%} |")
    return int(not kept)


def _mean(looks: list[Look], name: str) -> float:
    return float(np.mean([getattr(look, name) for look in looks]))


def _pace(looks: list[Look]) -> float:
    return (looks[-1].seconds - looks[0].seconds) / (looks[-1].update - looks[0].update)


if __name__ == "__main__":
    sys.exit(main())
