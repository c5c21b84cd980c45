"""The estimate of a run in which another model draws class images and previews, see `preview_model`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsMemoryControl
from mflux_vae_train.pipelines.footprint import Footprint, Workload

TRAINING = "training"
"""Name of the phase whose operations are those of one update."""

CLASS_IMAGES, PREVIEWS = "class images", "previews"
"""Names of the phases that draw."""


@dataclass(frozen=True, kw_only=True)
class DrawnWorkload(Workload):
    """
    Attributes:
        drawing: draws instead of the trained model.
    """

    drawing: SupportsMemoryControl


def footprint_of(pipeline: SupportsMemoryControl, work: Workload) -> Footprint:
    """What a run needs. Another model draws class images alone, and previews beside the trained one."""
    if not isinstance(work, DrawnWorkload):
        return checks.footprint(pipeline, work)
    plain = Workload(**{name: value for name, value in vars(work).items() if name != "drawing"})
    ours = checks.footprint(pipeline, replace(plain, class_images=0))
    theirs = checks.footprint(work.drawing, replace(plain, trained=0, assistant=0, text_encoder=False, fuse=False))
    drawn = {phase.name: phase for phase in theirs.phases}
    phases = list(ours.phases)
    for index, phase in enumerate(phases):
        if phase.name == PREVIEWS and PREVIEWS in drawn:
            phases[index] = replace(drawn[PREVIEWS], weights=phase.weights + drawn[PREVIEWS].weights)
    if CLASS_IMAGES in drawn:
        phases.insert(1, drawn[CLASS_IMAGES])
    needed = dict.fromkeys(one.access for one in (ours, theirs) if one.access)
    return Footprint(
        phases=phases,
        download=ours.download + theirs.download,
        cache=ours.cache or theirs.cache,
        access="; ".join(needed) or None,
    )
