"""An evaluator that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mflux_vae_train.evaluation.evaluator import Features, Measure, Prompt, Subject, of_kind
from mflux_vae_train.evaluation.score import Score, mean


class Brightness:
    """Evaluator: the subject is bright, other images are dark."""

    name, fingerprint = "brightness", "1"
    measures = (
        Measure(name="subject_fidelity", heading="subject", text="brightness", role="gained"),
        Measure(name="prior_preservation", heading="class", text="brightness of others", role="kept", worst=1.0),
    )

    def __init__(self) -> None:
        self.measured = 0

    def prompts(self, subject: Subject, *, images: int, quick: bool) -> Sequence[Prompt]:
        places = ["grass", "sand"][: 1 if quick else 2]
        return [
            *(Prompt(text=f"{subject.phrase} on {place}", count=images, kind="subject") for place in places),
            Prompt(text=subject.class_prompt, count=images, kind="class"),
        ]

    def features(self, subject: Subject, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> Features:
        self.measured += 1
        return {"brightness": np.array([image.mean() / 255 for image in images], np.float32)}

    def reference(self, subject: Subject) -> Features:
        return {"brightness": np.array([image.mean() / 255 for image in subject.images], np.float32)}

    def scores(
        self, subject: Subject, prompts: Sequence[Prompt], features: Features, reference: Features
    ) -> Mapping[str, Score]:
        named, other = (mean(features["brightness"][of_kind(prompts, kind)]) for kind in ("subject", "class"))
        return {"subject_fidelity": named, "prior_preservation": other}

    def goals(self, reference: Features) -> Mapping[str, float]:
        return {"subject_fidelity": float(reference["brightness"].mean())}
