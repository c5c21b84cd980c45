"""Seconds of the README's first command, and whether its estimates of the remaining time are right.

    python -m benchmarks.quick_start [--against CHECKOUT] [--updates N] [--rounds 1] [--eta]

CHECKOUT is another working tree of this repository (`git worktree add ../before COMMIT`); both run in turns, each with
its packages and weights. The difference is that of their pictures in samples/progress.png, the mean of all values in
[0, 1]; rounding errors grow while training, so 0.01 still looks the same.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import describe
from benchmarks.harness.process import ROOT

COMMAND = "mflux-train-dreambooth"
POLL = 0.05
"""Seconds between looks at metrics.jsonl."""
SHOWN = (5, 10, 20, 50, 100, 200, 400)
"""Updates whose estimate is shown."""


def flags(updates: int | None = None) -> list[str]:
    """The README's flags without the output folder, with another number of updates if given."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = readme.partition(f"```bash\n{COMMAND}")[2].partition("```")[0].replace("\\\n", " ")
    given = [flag for flag in shlex.split(command) if not flag.startswith("--output_dir=")]
    return given if updates is None else [*given, f"--max_train_steps={updates}"]


def run(checkout: Path, updates: int | None, output: Path) -> tuple[float, float]:
    """Run the command; return seconds until the first update and until its end.

    Raises:
        RuntimeError: it fails; names its last line.
    """
    module = "mflux_vae_train.dreambooth.cli"
    command = [sys.executable, "-m", module, *flags(updates), f"--output_dir={output}"]
    metrics, first, began = output / "metrics.jsonl", None, time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(POLL)
            if first is None and metrics.is_file() and metrics.stat().st_size:
                first = time.monotonic() - began
        seconds = time.monotonic() - began
        log.seek(0)
        if process.returncode:
            raise RuntimeError((log.read().strip() or "failed without output").splitlines()[-1])
    return seconds if first is None else first, seconds


def estimates(updates: int | None, output: Path) -> dict[int, tuple[float, float]]:
    """Train in this process; return estimated and actual remaining seconds by update."""
    from mflux_vae_train.dreambooth.config import DreamBoothSettings
    from mflux_vae_train.dreambooth.train import DreamBooth
    from mflux_vae_train.pipelines.registry import open_pipeline
    from mflux_vae_train.settings.flags import settings_from

    settings = settings_from(DreamBoothSettings, [*flags(updates), f"--output_dir={output}"])
    seen: dict[int, tuple[float, float]] = {}

    def note(progress: object) -> None:
        update, eta = getattr(progress, "update", 0), getattr(progress, "eta", None)
        if eta is not None and update not in seen:
            seen[update] = time.monotonic(), eta

    DreamBooth(open_pipeline(settings.model)).train(settings, on_progress=note)
    end = time.monotonic()
    return {update: (eta, end - at) for update, (at, eta) in seen.items() if update in SHOWN}


def pictures(output: Path) -> np.ndarray:
    """samples/progress.png, (H, W, 3) in [0, 1]."""
    from PIL import Image

    with Image.open(output / "samples" / "progress.png") as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--updates", type=int, help="number of updates (default: the README's)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each checkout (default 1)")
    parser.add_argument("--eta", action="store_true", help="also compare estimates of the remaining time")
    given = parser.parse_args(argv)
    checkouts = {"this checkout": ROOT} | ({"the other": given.against.resolve()} if given.against else {})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    print(describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for name, checkout in checkouts.items():
                times[name].append(run(checkout, given.updates, Path(folder) / f"{name} {number}"))
                print("{}: first update after {:.1f} s, end after {:.1f} s".format(name, *times[name][-1]), flush=True)
        if given.against:
            before, now = (statistics.median(end for _, end in times[name]) for name in ("the other", "this checkout"))
            drawn = [pictures(Path(folder) / f"{name} 0") for name in checkouts]
            same = drawn[0].shape == drawn[1].shape
            difference = f"{np.abs(drawn[0] - drawn[1]).mean():.4f}" if same else "in size"
            print(f"{now / before:.2f} of the other's time; pictures differ by {difference}")
        if given.eta:
            print("update: estimated, actual seconds left")
            for update, (eta, left) in estimates(given.updates, Path(folder) / "eta").items():
                print(f"{update}: {eta:.1f}, {left:.1f} ({eta / left - 1:+.0%})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
