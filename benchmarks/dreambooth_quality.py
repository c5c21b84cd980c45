"""Does DreamBooth teach the subject, and does the class survive? Measured by the checker on an embedded pipeline.

    python -m benchmarks.dreambooth_quality [--model tiny-sd] [--quick] [--json] [--subjects 3] [--seeds 3]
        [--ways dop ...] [--pictures DIR] [--flag=value ...]

Flags of `mflux-train-dreambooth` change the training; what is trained on, the prompts, the seed, previews and
checkpoints are the benchmark's own.

For each of several subjects that the base has never seen, over several seeds, in each of the `WAYS`: with class images,
with output preservation (dop), without prior preservation; and with dop another optimizer, rank, a quantised base, or a
text encoder that learns, too:

- subject_fidelity: share of pictures of "a photo of sks <class>" that show the subject;
- class_retention: share of pictures of "a photo of a <class>" that show the class in another colour than the subject's,
  relative to the base's share (about 7/8);
- diversity: mean distance between two pictures of the class (RMS over pixels, [0, 1]), relative to the base's;
- prompts: share of pictures of other prompts of the world with shape, colour and background right; base beside it.

Measured on 2026-11-21 (Intel Xeon, guidance 1.5, 14 steps, three subjects, three seeds, 32 pictures per figure;
`--train_batch_size=4 --gradient_accumulation_steps=1 --max_train_steps=300 --lr_warmup_steps=15`):

| | subject fidelity | class retention | diversity | prompts |
|---|---|---|---|---|
| with prior preservation | 0.97 | 0.95 | 0.94 | 0.86 |
| without | 1.00 | 0.90 | 0.77 | 0.25 |

Class retention in both tables of `tiny` is an earlier measure: the share of class pictures that show the class and not
the whole subject, so a star in the subject's colour without its core counts.

One subject (the star), three seeds (`--subjects 1 --ways ...`); in brackets the class retention of each seed:

| `--ways` | subject fidelity | class retention | diversity | prompts |
|---|---|---|---|---|
| `class_images`, weight 0.3 | 0.99 | 0.91 (0.97, 0.88, 0.88) | 0.95 | 0.90 |
| `dop`, weight 1, AdamW, rank 16, float32 | 0.99 | 0.89 (0.97, 0.91, 0.78) | 1.01 | 1.00 |
| `none` | 1.00 | 0.73 (0.94, 0.69, 0.56) | 0.81 | 0.32 |
| `prodigy`: dop, `--lr_scheduler constant` | 0.96 | 0.88 (0.91, 0.84, 0.88) | 0.96 | 1.00 |
| `rank_4`: dop | 0.98 | 0.94 (0.97, 0.94, 0.91) | 0.98 | 1.00 |
| `4_bits`: dop, quantised base (two seeds) | 0.98 | 0.89 (1.00, 0.78) | 1.00 | 0.99 |
| `text_encoder`: dop, CLIP trained (one seed, star and heart) | 0.97 | 0.92 | 1.01 | 0.99 |

Seeds differ by up to 0.2, so optimizers, ranks and bits cannot be ranked by this. Certain: without preservation the
other prompts are forgotten with every seed; `dop` keeps them better than class images and learns the subject as well.
Prodigy with a cosine over 300 updates is too short (fidelity 0.34).

`--model tiny-sd` on 2026-11-29 (AMD EPYC, three subjects, one seed; `--train_batch_size=4
--gradient_accumulation_steps=1 --max_train_steps=500 --lr_warmup_steps=15`):

| | subject fidelity | class retention | diversity | prompts |
|---|---|---|---|---|
| with class images | 0.85 (0.78, 0.84, 0.94) | 0.85 (0.88, 0.92, 0.75) | 0.84 | 0.88 |
| without | 0.88 (0.84, 0.78, 1.00) | 0.02 (0.00, 0.00, 0.07) | 0.73 | 0.59 |

Without class images every star turns purple, the subject's colour. With class images, some shapes are distorted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.harness.machine import describe
from mflux_vae.images import grid, save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.evaluation import evaluator as evaluation
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.tiny_world.evaluate import CheckerEvaluator, other_prompts, sample_images
from mflux_vae_train.tiny_world.words import article
from mflux_vae_train.tiny_world.world import SUBJECTS, Subject, subject_images

INSTANCE_IMAGES = 5
PICTURES = 32
SHOWN = 8
EVALUATION_SEED = 1234
TOKEN = "sks"

WAYS: Mapping[str, Mapping[str, Any]] = {
    "class_images": {"prior_preservation": "class_images"},
    "dop": {"prior_preservation": "dop"},
    "none": {"prior_preservation": "none"},
    # its search for a rate takes longer than a cosine leaves it in a few hundred updates
    "prodigy": {"prior_preservation": "dop", "optimizer": "prodigy", "lr_scheduler": "constant"},
    "rank_4": {"prior_preservation": "dop", "rank": 4},
    "4_bits": {"prior_preservation": "dop", "quantize": 4},
    "text_encoder": {"prior_preservation": "dop", "train_text_encoder": True},
}
"""What differs from the other settings; where nothing is said, an adapter of the pipeline's rank, with AdamW, over
float32."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Shares in [0, 1], `class_retention` and `diversity` as ratios to the base's; `seconds` of training."""

    subject_fidelity: float
    class_retention: float
    diversity: float
    prompts: float
    seconds: float


def measure(
    pipeline: DiffusionPipeline,
    subject: Subject,
    base: Measured | None = None,
    seconds: float = 0.0,
    sheet: Path | None = None,
) -> Measured:
    """What `pipeline` draws after training on `subject`.

    Args:
        base: of the pipeline before training; None to measure that.
        sheet: a picture to write: some pictures of the subject, and below them some of its class.
    """
    trained = evaluation.Subject(
        phrase=f"{TOKEN} {subject.shape}",
        noun=subject.shape,
        instance_prompt=f"a photo of {TOKEN} {subject.shape}",
        class_prompt=_class_prompt(subject),
        images=subject_images(subject, INSTANCE_IMAGES),
    )
    evaluator = CheckerEvaluator()
    prompts = evaluator.prompts(trained, images=PICTURES // 8, quick=False)
    named = sample_images(pipeline, [trained.instance_prompt] * PICTURES, seed=EVALUATION_SEED)
    plain = sample_images(pipeline, [trained.class_prompt] * PICTURES, seed=EVALUATION_SEED + 1)
    if sheet is not None:
        save_image(sheet, grid([*named[:SHOWN], *plain[:SHOWN]], SHOWN))
    texts = [text for text, _ in other_prompts(subject.shape)]
    others = sample_images(pipeline, texts, seed=EVALUATION_SEED + 2)
    features = evaluator.features(trained, prompts, [*named, *plain, *others])
    scores = evaluator.scores(trained, prompts, features, evaluator.reference(trained))
    return Measured(
        subject_fidelity=scores["subject_fidelity"].value,
        class_retention=scores["prior_preservation"].value / (1.0 if base is None else base.class_retention),
        diversity=scores["diversity"].value / (1.0 if base is None else base.diversity),
        prompts=scores["prompt_fidelity"].value,
        seconds=seconds,
    )


def run(
    subject: Subject, seed: int, way: str, given: DreamBoothSettings, base: Measured, sheets: Path | None = None
) -> Measured:
    """One training and its measurement.

    Args:
        sheets: folder for a picture of it, see `measure`.
    """
    sheet = None if sheets is None else sheets / f"{subject.colour}-{subject.shape}-{seed}-{way}.png"
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for index, image in enumerate(subject_images(subject, INSTANCE_IMAGES, seed=seed)):
            Image.fromarray(image).save(photos / f"{index}.png")
        settings = replace(
            given,
            instance_data_dir=str(photos),
            output_dir=str(Path(folder) / "out"),
            instance_prompt=f"a photo of {TOKEN} {subject.shape}",
            class_prompt=_class_prompt(subject),
            num_validation_images=0,
            checkpointing_steps=None,
            seed=seed,
            **WAYS[way],
        )
        pipeline = open_pipeline(given.model)
        began = time.monotonic()
        DreamBooth(pipeline).train(settings)
        return measure(pipeline, subject, base, time.monotonic() - began, sheet)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; unknown flags go to the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=["tiny", "tiny-sd"], default="tiny", help="embedded pipeline (default tiny)")
    parser.add_argument("--quick", action="store_true", help="one seed, in the first way only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--subjects", type=int, default=3, help=f"how many of {len(SUBJECTS)} (default 3)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    ways = list(WAYS)
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, help="which to compare (default all)")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of each run's subject and class")
    arguments, flags = parser.parse_known_args(argv)
    required = [f"--model={arguments.model}", "--instance_data_dir=-", "--instance_prompt=-"]
    given = settings_from(DreamBoothSettings, [*required, *flags])
    logging.getLogger("mflux_vae_train").setLevel(logging.WARNING)
    seeds = range(1 if arguments.quick else arguments.seeds)
    plan = [
        (subject, seed, way)
        for subject in SUBJECTS[: arguments.subjects]
        for seed in seeds
        for way in arguments.ways[: 1 if arguments.quick else None]
    ]
    base = open_pipeline(arguments.model)
    before = {subject: measure(base, subject) for subject in SUBJECTS[: arguments.subjects]}
    columns = ("subject_fidelity", "class_retention", "diversity", "prompts", "prompts_before", "seconds")
    if not arguments.json:
        print(describe())
        print(f"{'subject':32}{'way':>14}{'seed':>5}" + "".join(f"{name:>18}" for name in columns), flush=True)
    results = []
    for subject, seed, way in tqdm(plan, file=sys.stderr, disable=None):
        row = {
            "subject": f"{subject.colour} {subject.shape} with {subject.core} core",
            "seed": seed,
            "way": way,
            "prompts_before": before[subject].prompts,
            **asdict(run(subject, seed, way, given, before[subject], arguments.pictures)),
        }
        results.append(row)
        if not arguments.json:
            shown = "".join(f"{row[name]:18.2f}" for name in columns)
            print(f"{row['subject']:32}{way:>14}{seed:>5}{shown}", flush=True)
    if arguments.json:
        print(json.dumps({"machine": describe(), "runs": results}))
        return 0
    for way in dict.fromkeys(row["way"] for row in results):
        rows = [row for row in results if row["way"] == way]
        means = "".join(f"{np.mean([row[name] for row in rows]):18.2f}" for name in columns)
        print(f"{'mean':32}{way:>14}{'':5}{means}")
    return 0


def _class_prompt(subject: Subject) -> str:
    return f"a photo of {article(subject.shape)} {subject.shape}"


if __name__ == "__main__":
    sys.exit(main())
