"""``mflux-train-dreambooth``: the command line of `DreamBooth.train`. Its flags are the fields of `config`.

Heavy imports are inside functions, so that ``--help`` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

PROG = "mflux-train-dreambooth"
LOGGERS = ("mflux_vae", "mflux_vae_train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    with warnings.catch_warnings(record=True) as early:  # importing mflux_vae warns on a CPU without a fast BLAS
        from mflux_vae.utils.console import run_command
    return run_command(PROG, lambda: _run(argv), levels=dict.fromkeys(LOGGERS, logging.INFO), early=early)


def _run(argv: Sequence[str] | None) -> None:
    from mflux_vae_train.dreambooth.config import DreamBoothSettings
    from mflux_vae_train.dreambooth.ignored_flags import IGNORED_FLAGS
    from mflux_vae_train.pipelines.mflux.train_json import translate
    from mflux_vae_train.settings.flags import settings_from
    from mflux_vae_train.settings.values import MissingSettings

    try:
        settings = settings_from(
            DreamBoothSettings,
            argv,
            prog=PROG,
            description=_description(),
            ignored_flags=IGNORED_FLAGS,
            translate=translate,
        )
    except MissingSettings as error:
        raise MissingSettings(f"{error}; for example: {_example()}") from None
    import_module("mflux_vae.runtime.device")  # one clear error where MLX cannot be imported
    from mflux_vae_train.distributed import interrupts, process_group
    from mflux_vae_train.dreambooth.data.dataset import check_files
    from mflux_vae_train.dreambooth.train import DreamBooth
    from mflux_vae_train.monitoring.trackers import requested_trackers
    from mflux_vae_train.pipelines.registry import open_pipeline

    # before opening a pipeline, which may download and read gigabytes of weights
    requested_trackers(settings.report_to)
    with process_group.join() as processes, interrupts.handling(processes):
        check_files(settings)
        named = ("revision", "variant", "vae", "prediction_type")
        options = {name: getattr(settings, name) for name in named}
        DreamBooth(open_pipeline(settings.model, **options)).train(settings)


def _description() -> str:
    # from package metadata, as the registry imports MLX
    names = sorted({entry.name for entry in entry_points(group="mflux_vae_train.pipelines")})
    pipelines = ", ".join(name for name in names if not name.endswith("Pipeline"))
    return (
        "Teach a diffusion pipeline a subject from a few images (DreamBooth). The same command continues an"
        f" interrupted run. Installed pipelines: {pipelines or 'none'}."
    )


def _example() -> str:
    """A command that runs as it is: on the embedded pipeline and images."""
    images = Path(__file__).parents[1] / "pipelines" / "tiny" / "example"
    prompt = "--instance_prompt 'a photo of sks star' --max_train_steps 100 --output_dir star"
    return f"{PROG} --model tiny --instance_data_dir {shlex.quote(str(images))} {prompt}"


if __name__ == "__main__":
    sys.exit(main())
