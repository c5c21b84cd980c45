"""Latents, embeddings, class images and previews of a device that failed are refused by name; white photos are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import ImageError, RunError, WeightsError
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.class_images import PROMPT_KEY, check_class_images
from mflux_vae_train.dreambooth.data.encoding import open_cache
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.contracts.fake import FakePipeline

Make = Callable[..., DreamBoothSettings]


def returning(patch: pytest.MonkeyPatch, method: str, change: Callable[[mx.array], mx.array]) -> None:
    """Let a method of the pipeline change its results: the arrays of a dictionary, or the last one of a batch."""
    before = getattr(FakePipeline, method)

    def call(self: FakePipeline, *arguments: Any, **named: Any) -> Any:
        result = before(self, *arguments, **named)
        if isinstance(result, dict):
            return {name: change(array) for name, array in result.items()}
        return mx.concatenate([result[:-1], change(result[-1:])])

    patch.setattr(FakePipeline, method, call)


NAN, ZERO = (lambda array: array * float("nan")), mx.zeros_like


@pytest.mark.parametrize(
    ("method", "change", "error", "name"),
    [
        ("encode_images", NAN, WeightsError, "picture-4.png"),
        ("encode_images", ZERO, WeightsError, "picture-4.png"),
        ("encode_prompts", NAN, WeightsError, "a photo of sks dog"),
        ("sample", NAN, RunError, "class image 2 of 'a photo of dog'"),
        ("sample", ZERO, RunError, "class image 2 of 'a photo of dog'"),
    ],
)
def test_results_of_a_failed_device_are_named_and_not_trained_on(
    method: str, change: Any, error: type[Exception], name: str, short_run: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    returning(monkeypatch, method, change)
    with pytest.raises(error) as caught:
        DreamBooth(FakePipeline()).train(short_run(num_class_images=3, class_prompt="a photo of dog"))
    assert name in str(caught.value)
    assert not [*(tmp_path / "out").glob("checkpoint-*")]
    assert method == "encode_images" or not [*(tmp_path / "out").rglob("class-00002.png")]


def test_constant_latents_of_an_earlier_run_are_computed_again(
    short_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(FakePipeline(), tmp_path / "encodings")
    zero = {"latents": mx.zeros((4, 4, 3))}
    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "get", lambda self, key: zero if "image" in key else None)
        returning(patch, "encode_images", ZERO)
        with pytest.raises(WeightsError, match="same value"):
            DreamBooth(FakePipeline()).train(short_run(prior_preservation="none"))


def test_photos_of_one_colour_train(short_run: Make, instance_dir: Path) -> None:
    """The fake encoder averages, so latents of a white photo are one value everywhere."""
    save_image(instance_dir / "picture-0.png", np.full((20, 16, 3), 255, np.uint8))
    assert DreamBooth(FakePipeline()).train(short_run(prior_preservation="none")).updates == 6


def test_generated_class_images_of_one_colour_are_refused(tmp_path: Path) -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    save_image(tmp_path / "photo.png", black)
    assert check_class_images(tmp_path, "a dog") == [tmp_path / "photo.png"]
    save_image(tmp_path / "class-00000.png", black, text={PROMPT_KEY: "a dog"})
    with pytest.raises(ImageError, match=r"class-00000.png .* one colour"):
        check_class_images(tmp_path, "a dog")


def test_flawed_previews_are_named(
    short_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"num_validation_images": 1, "prior_preservation": "none", "validation_prompt": ("a cat",)}
    given["validation_steps"] = 6
    for change, words, drawn in ((NAN, "image 0 of 'a cat' has NaN", 0), (ZERO, "'a cat' are one colour", 2)):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            returning(patch, "sample", change)
            DreamBooth(FakePipeline()).train(short_run(**given, output_dir=str(tmp_path / words[:3])))
        assert words in caplog.text
        assert len([*(tmp_path / words[:3] / "samples").glob("step-*")]) == drawn
