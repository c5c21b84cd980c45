"""DreamBooth steps per second on the embedded pipeline, by the whole command: imports, class pictures, previews.

    python -m benchmarks.dreambooth_speed [--against CHECKOUT] [--quick]

With another checkout of this repository (`git worktree add ../before COMMIT`) both run in turns, each on its own
packages and weights; what they learn is not compared here.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.cli import Options, main
from benchmarks.harness.process import ROOT
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.worker import RSS_UNIT

COMMAND = (
    "--model=tiny",
    "--instance_data_dir=mflux_vae_train/pipelines/tiny/example",
    "--instance_prompt=a photo of xyz star",
    "--train_batch_size=1",
    "--gradient_accumulation_steps=4",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=10",
    "--guidance=7.5",
    "--num_class_images=10",
)
"""README's, but for the number of updates and what hangs on it."""


def rows(options: Options) -> list[Row]:
    """The measurement."""
    updates = 20 if options.quick else 200
    before = [_side("the other checkout", options.against, updates)] if options.against else []
    return [
        Row(
            work=f"tiny pipeline, DreamBooth, whole command, {updates} steps",
            ours=_side("this checkout", ROOT, updates),
            peers=before,
            tolerance=None,
            rounds=1 if options.quick else 3,
            unit="steps",
        )
    ]


def command(checkout: str, updates: int) -> Work:
    """The command line of a checkout, in a process of its own with an output folder of its own."""

    def run() -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "mflux_vae_train.dreambooth.cli", *COMMAND),
                    *(f"--max_train_steps={updates}", f"--output_dir={folder}/output"),
                ],
                cwd=checkout,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "failed without a word").splitlines()[-1])
        return {"updates": updates}

    return Work(run=run, peak=lambda: resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT)


def _side(name: str, checkout: Path, updates: int) -> Implementation:
    return Implementation(
        name=name,
        build="benchmarks.dreambooth_speed:command",
        settings={"checkout": str(checkout.resolve()), "updates": updates},
        units=updates,
    )


if __name__ == "__main__":
    sys.exit(main({"dreambooth_speed": rows}, __doc__))
