"""The evaluator of a pipeline, through entry points of the group ``mflux_vae_train.evaluators``.

    [project.entry-points."mflux_vae_train.evaluators"]
    mine = "my_package:MyEvaluator"

The name is a pipeline's, the value a callable without arguments that returns an `Evaluator`. A pipeline without an
entry point is evaluated as in DreamBench.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

from mflux_vae.errors import MfluxVaeError, PluginError, SettingsError
from mflux_vae_train.evaluation.evaluator import Evaluator

GROUP = "mflux_vae_train.evaluators"
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-base-patch32"


def open_evaluator(
    pipeline: str, *, dino: str | None = None, clip: str | None = None, lpips: Sequence[str] | None = None
) -> Evaluator:
    """The evaluator of a pipeline, or of DreamBench if none is registered or a network is given.

    Args:
        pipeline: its name.
        dino, clip: folder or `owner/name` of the networks; None for the published ones.
        lpips: files of `LPIPS.from_files`.

    Raises:
        SettingsError: too many files of LPIPS.
        WeightsError: a network is missing and cannot be downloaded, or its files are broken.
        PluginError: see `registered`.
    """
    if dino is None and clip is None and not lpips and (evaluator := registered(pipeline)) is not None:
        return evaluator
    from mflux_vae_train.evaluation.dreambench import DreamBench

    if len(lpips or ()) > 2:
        raise SettingsError(f"--lpips takes 1 or 2 files, not {len(lpips or ())}")
    return DreamBench.from_pretrained(dino or DINO, clip or CLIP, lpips)


def registered(pipeline: str) -> Evaluator | None:
    """The evaluator that is registered for a pipeline; None if there is none.

    Raises:
        PluginError: the entry point cannot be imported, or does not return an evaluator.
    """
    entries = sorted(entry_points(group=GROUP, name=pipeline), key=lambda entry: entry.value)
    if not entries:
        return None
    entry = entries[0]
    try:
        evaluator = entry.load()()
    except MfluxVaeError:
        raise
    except Exception as error:  # any error of a plugin
        raise PluginError(
            f"evaluator {entry.name!r}: {entry.value} failed ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(evaluator, Evaluator):
        members = ("name", "measures", "fingerprint", "prompts", "features", "reference", "scores", "goals")
        missing = ", ".join(member for member in members if not hasattr(evaluator, member))
        raise PluginError(
            f"evaluator {entry.name!r}: {entry.value} returned a {type(evaluator).__name__} without {missing}"
        )
    roles = {measure.role for measure in evaluator.measures}
    if absent := [role for role in ("gained", "kept") if role not in roles]:
        raise PluginError(f"evaluator {entry.name!r}: none of its measures has the role {' or '.join(absent)}")
    return evaluator
