"""The evaluator of a pipeline, through entry points of the group ``mflux_vae_train.evaluators``.

    [project.entry-points."mflux_vae_train.evaluators"]
    mine = "my_package:MyEvaluator"

The name is a pipeline's, the value a callable without arguments that returns an `Evaluator`. A pipeline without an
entry point is evaluated as in DreamBench.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from mflux_vae.errors import MfluxVaeError, PluginError
from mflux_vae_train.evaluation.evaluator import Evaluator

GROUP = "mflux_vae_train.evaluators"


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
    return evaluator
