"""Every claim about speed and memory, measured, in one table.

    python -m benchmarks [--quick] [--json] [--only NAME]

On a GPU that MLX and torch both know, the same rows are measured there. Peers are optional (extra `parity`): what is
not installed is said below the table. How well DreamBooth learns is measured elsewhere: `benchmarks.dreambooth_quality`
and `benchmarks.dreambooth_photos`; what a weight does to total correlation: `benchmarks.disentanglement`.
"""

from __future__ import annotations

import sys

from benchmarks import (
    dreambooth_speed,
    flux_forward,
    flux_training,
    image_loading,
    text_encoders,
    vae_speed,
    vae_training,
)
from benchmarks.harness import main

SCRIPTS = {
    "vae_speed": vae_speed.rows,
    "vae_training": vae_training.rows,
    "flux_training": flux_training.rows,
    "flux_forward": flux_forward.rows,
    "text_encoders": text_encoders.rows,
    "image_loading": image_loading.rows,
    "dreambooth_speed": dreambooth_speed.rows,
}

if __name__ == "__main__":
    sys.exit(main(SCRIPTS, __doc__))
