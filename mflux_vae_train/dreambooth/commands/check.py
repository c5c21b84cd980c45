"""``mflux-dreambooth check``."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.paths import expand
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.settings.flags import add_flags

FLAGS = (
    *("model", "revision", "variant", "instance_data_dir", "instance_prompt", "resolution", "caption_column"),
    *("center_crop", "num_crops", "use_aspect_ratio_buckets", "aspect_ratio_buckets", "masked_loss"),
    *("class_prompt", "class_data_dir", "prior_preservation", "num_class_images", "max_sequence_length"),
    *("validation_prompt", "validation_data_dir", "validation_share"),
)
"""Settings that decide what a run sees. All others can be in a file."""


def check(parser: ArgumentParser) -> Callable[..., None]:
    """Show what a run would see in a folder: images as cropped, captions, copies, and what is not used.

    Exit status 2: a run would be refused.
    """
    parser.add_argument("folder", nargs="?", type=expand, metavar="FOLDER", help="images of the subject")
    parser.add_argument(
        "--output", type=expand, metavar="FILE", help="contact sheet, a PNG file (default: FOLDER-check.png)"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    add_flags(parser, DreamBoothSettings, only=FLAGS)
    return _run


def _run(folder: str | None = None, output: str | None = None, as_json: bool = False, **given: Any) -> None:
    import json

    from mflux_vae.images import save_image
    from mflux_vae_train.dreambooth.ignored_flags import IGNORED_FLAGS
    from mflux_vae_train.dreambooth.inspection import report, sheet
    from mflux_vae_train.dreambooth.inspection.findings import inspect
    from mflux_vae_train.dreambooth.inspection.settings import NO_MODEL, CheckSettings, assumptions
    from mflux_vae_train.pipelines.mflux.train_json import translate
    from mflux_vae_train.pipelines.registry import open_pipeline
    from mflux_vae_train.settings.flags import settings_of
    from mflux_vae_train.settings.values import MissingSettings

    if folder is not None and given.setdefault("instance_data_dir", folder) != folder:
        raise SettingsError(f"FOLDER is {folder}, and --instance_data_dir {given['instance_data_dir']}; give one")
    try:
        settings = settings_of(CheckSettings, given, ignored_flags=IGNORED_FLAGS, translate=translate)
    except MissingSettings:  # a check needs nothing else
        raise SettingsError("FOLDER is missing: give the folder with the images (--help lists flags)") from None
    path = sheet.sheet_file(output, settings)
    pipeline = None
    if settings.model != NO_MODEL:
        named = ("revision", "variant", "vae", "prediction_type")
        pipeline = open_pipeline(settings.model, **{name: getattr(settings, name) for name in named})
    assumed = assumptions(settings)
    findings = inspect(settings, pipeline)
    if findings.images:
        save_image(path, sheet.draw_sheet(findings.images), text={sheet.TEXT_KEY: "contact sheet"})
    if as_json:
        print(json.dumps(report.as_json(findings, assumed, path if findings.images else None), indent=2))
    else:
        print("\n".join(report.text(findings, assumed)))
        if findings.images:
            print(f"contact sheet: {path}")
    if findings.errors:
        first, *others = findings.errors
        more = f"; and {len(others)} more errors, listed above" if others else ""
        raise type(first)(f"a run would be refused: {first}{more}")
