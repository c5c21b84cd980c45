"""A measured number with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Score:
    """
    Attributes:
        error: standard error, from the number of images and how much they differ.
    """

    value: float
    error: float


def mean(values: Sequence[float] | np.ndarray, groups: Sequence[int] | np.ndarray | None = None) -> Score:
    """Mean over images.

    Args:
        groups: the prompt of each image. Prompts are the same for all adapters, so only differences within a prompt
            are chance (the error of a stratified mean). Unused if a prompt has a single image.
    """
    numbers = np.asarray(values, np.float64)
    labels = np.zeros(len(numbers), int) if groups is None else np.asarray(groups)
    _, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        labels = np.zeros_like(labels)
    if len(numbers) < 2:
        return Score(value=float(numbers.mean()), error=0.0)
    strata = [numbers[labels == label] for label in np.unique(labels)]
    variance = sum(len(each) * each.var(ddof=1) for each in strata) / len(numbers) ** 2
    return Score(value=float(numbers.mean()), error=float(np.sqrt(variance)))


def share(hits: Sequence[bool] | np.ndarray) -> Score:
    """Share of images. The error is that of Agresti and Coull (1998), which is not zero if all or none are hits."""
    count, total = int(np.sum(hits)), len(hits)
    adjusted = (count + 2) / (total + 4)
    return Score(value=count / total, error=float(np.sqrt(adjusted * (1 - adjusted) / (total + 4))))


def pair_mean(distances: np.ndarray) -> Score:
    """Mean distance of two different images, from all distances (N, N). The error is that of a U-statistic."""
    count = len(distances)
    if count < 2:
        return Score(value=0.0, error=0.0)
    to_others = (distances.sum(axis=1) - np.diagonal(distances)) / (count - 1)
    return Score(value=float(to_others.mean()), error=float(2 * to_others.std(ddof=1) / np.sqrt(count)))


def average(scores: Sequence[Score]) -> Score:
    """Mean of independent scores."""
    errors = np.array([score.error for score in scores])
    value = float(np.mean([score.value for score in scores]))
    return Score(value=value, error=float(np.sqrt(np.square(errors).sum()) / len(scores)))
