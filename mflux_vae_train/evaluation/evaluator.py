"""The interface of an evaluator: which images of a subject it needs, and what it measures in them.

Register one for a pipeline as an entry point, see `registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from mflux_vae_train.evaluation.score import Score

Features = Mapping[str, np.ndarray]
"""Named arrays from which scores follow without the images."""

Role = Literal["gained", "kept", "shown"]
"""How the choice of an adapter uses a measure: training should raise it, training should not lose it, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that an evaluator computes.

    Attributes:
        name: key in files.
        heading: of a column.
        text: definition and range, one sentence.
        worst: the value when all is lost: 0, or for a similarity that should stay low 1.
    """

    name: str
    heading: str
    text: str
    role: Role
    worst: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an adapter was trained on.

    Attributes:
        phrase: names the subject in a prompt, as "sks dog".
        noun: names its class, as "dog".
        images: uint8 (H, W, 3) each, the instance images.
        live: whether it is an animal or a person; None: by the noun.
    """

    phrase: str
    noun: str
    instance_prompt: str
    class_prompt: str
    images: Sequence[np.ndarray]
    live: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to draw.

    Attributes:
        count: number of images.
        kind: for the evaluator.
    """

    text: str
    count: int
    kind: str


@runtime_checkable
class Evaluator(Protocol):
    """
    Attributes:
        name: for the table.
        fingerprint: differs whenever features do.
        measures: in the order of the columns. The chart shows the first "gained" over the first "kept" one.
    """

    name: str
    measures: Sequence[Measure]

    @property
    def fingerprint(self) -> str: ...

    def prompts(self, subject: Subject, *, images: int, quick: bool) -> Sequence[Prompt]:
        """The prompts to draw.

        Args:
            images: number of images per prompt in the evaluator's protocol, at least 1.
            quick: whether fewer prompts should do.

        Raises:
            InputError: the evaluator cannot judge this subject.
        """
        ...

    def features(self, subject: Subject, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> Features:
        """What is measured in drawn images, uint8 (H, W, 3) each, in the order of the prompts."""
        ...

    def reference(self, subject: Subject) -> Features:
        """What is measured in the instance images."""
        ...

    def scores(
        self, subject: Subject, prompts: Sequence[Prompt], features: Features, reference: Features
    ) -> Mapping[str, Score]:
        """The value of each measure by name."""
        ...

    def goals(self, reference: Features) -> Mapping[str, float]:
        """The values that real images of the subject have, for the measures that training should raise."""
        ...


def of_kind(prompts: Sequence[Prompt], kind: str) -> np.ndarray:
    """Indices of the images of one kind of prompts."""
    kinds = np.array([prompt.kind for prompt in prompts for _ in range(prompt.count)])
    return np.flatnonzero(kinds == kind)
