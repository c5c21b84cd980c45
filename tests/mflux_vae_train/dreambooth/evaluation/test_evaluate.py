"""Evaluations with a toy pipeline and evaluator: what is drawn, kept, measured again and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.images import load_image
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train.dreambooth.best_adapter import Best
from mflux_vae_train.dreambooth.data.encoding import EncodedPrompts
from mflux_vae_train.dreambooth.drawing.source import Source
from mflux_vae_train.dreambooth.evaluation.evaluate import evaluate
from mflux_vae_train.dreambooth.evaluation.plan import plan
from mflux_vae_train.dreambooth.evaluation.result import Evaluation
from mflux_vae_train.evaluation.evaluator import Subject
from tests.mflux_vae_train.dreambooth.evaluation.brightness import Brightness

SUBJECT = Subject(
    phrase="sks dog",
    noun="dog",
    instance_prompt="a photo of sks dog",
    class_prompt="a photo of a dog",
    images=[np.full((12, 16, 3), 200, np.uint8)],
)
LEARNED = {"50": 0.2, "100": 0.4, "150": 0.65}
"""Brightness of the subject that each adapter draws."""


class Toy:
    """Stands for `Adapted`: draws grey images with noise, brighter the more the adapter learned."""

    size, steps, guidance = (16, 16), 2, 1.5

    def __init__(self, source: Source, drawn: list[int], fails_after: int = 1000) -> None:
        self.source, self.pipeline = source, self
        self._drawn, self._fails_after, self._level = drawn, fails_after, 0.0

    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        named = mx.array([[float("sks" in prompt)] for prompt in prompts])
        return EncodedPrompts(conditioning={"named": named}, rows={prompt: i for i, prompt in enumerate(prompts)})

    @contextmanager
    def using(self, label: str, scale: float) -> Iterator[None]:
        self._level = scale * LEARNED[label] if scale else 0.0
        yield
        self._level = 0.0

    def sample(self, conditioning: Mapping[str, mx.array], *, size, steps, guidance, key: mx.array) -> mx.array:
        if len(self._drawn) >= self._fails_after:
            raise KeyboardInterrupt
        self._drawn.append(key.shape[0])
        noise = mx.stack([mx.random.uniform(-0.1, 0.1, (*size, 3), key=one) for one in key])
        level = self._level * conditioning["named"][..., None, None]
        return noise + 2 * level - 0.8


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    files = {label: tmp_path / f"{label}.safetensors" for label in LEARNED}
    for label, file in files.items():
        file.write_text(label)
    return files


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chart and the sheet, which take longest, are not drawn."""
    monkeypatch.setattr("mflux_vae_train.dreambooth.evaluation.evaluate.write_chart", lambda *_: None)
    monkeypatch.setattr(
        "mflux_vae_train.dreambooth.evaluation.evaluate._sheet", lambda *_: np.zeros((1, 1, 3), np.uint8)
    )


@pytest.fixture
def run(tmp_path: Path, adapters: dict[str, Path]) -> Callable[..., tuple[Evaluation, int, int]]:
    """Evaluates in one folder; returns the result, the number of images drawn, and of albums measured."""

    def start(*labels: str, scales: Sequence[float] = (1.0,), fails_after: int = 1000, **options: Any) -> Any:
        source = Source(path="run", model="toy", adapters={label: adapters[label] for label in labels or LEARNED})
        drawn: list[int] = []
        evaluator = Brightness()
        entries = plan(source, None, scales, updates=150)
        toy: Any = Toy(source, drawn, fails_after)
        given = {"images": 3, "model": {"weights": "a"}, **options}
        found = evaluate([toy], entries, SUBJECT, evaluator, tmp_path / "evaluation", **given)
        return found, sum(drawn), evaluator.measured

    return start


def test_result_is_written_and_recommends(run, tmp_path: Path) -> None:
    found, drawn, measured = run(scales=(1.0, 0.5))
    assert (drawn, measured) == (7 * 9, 7)  # untrained, three adapters at two scales; two prompts and the class
    assert found.recommendation().row.name == "150" and found.recommendation().row.scale == 1
    folder = tmp_path / "evaluation"
    document = json.loads((folder / "evaluation.json").read_text())
    assert document["recommended"] == {"checkpoint": "150", "scale": 1.0} and len(document["rows"]) == 6
    table = found.table()
    assert "150" in table and "±" in table and "untrained" in table and document["reason"] in table
    for name in ("fidelity.png", "pictures.png"):
        assert load_image(folder / name).std() > 0
    assert len([*folder.glob("images/*/*.png")]) == 7 * 9


@pytest.mark.usefixtures("without_pictures")
def test_a_repeated_evaluation_draws_and_measures_nothing(run) -> None:
    first, *_ = run()
    again, drawn, measured = run()
    assert (drawn, measured) == (0, 0) and again.document() == first.document()


@pytest.mark.usefixtures("without_pictures")
def test_only_what_is_new_is_drawn(run, adapters: dict[str, Path]) -> None:
    run("50", "100")
    assert run()[1:] == (9, 1)  # another checkpoint
    assert run(scales=(1.0, 0.5))[1:] == (27, 3)
    adapters["100"].write_text("trained again")
    assert run()[1:] == (9, 1)
    assert run(quick=True)[1:] == (0, 4)  # fewer of the same images
    assert run(model={"weights": "b"})[1:] == (36, 4)


@pytest.mark.usefixtures("without_pictures")
def test_an_interrupted_evaluation_continues_with_the_same_result(run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(fails_after=2)
    assert not (tmp_path / "evaluation" / "evaluation.json").exists()
    continued, drawn, _ = run()
    assert 0 < drawn < 36
    before = {file: file.read_bytes() for file in tmp_path.glob("evaluation/images/*/*.png")}
    for file in [*before][:2]:
        file.unlink()
    assert run()[0].document() == continued.document()
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.usefixtures("without_pictures")
def test_noise_is_the_same_for_all_adapters(run, tmp_path: Path) -> None:
    run()
    albums = [tmp_path / "evaluation" / "images" / name for name in ("untrained", "50", "150")]
    for file in albums[0].glob("a-photo-of-a-dog*.png"):
        images = [load_image(album / file.name) for album in albums]
        assert all(np.array_equal(images[0], image) for image in images)  # no adapter changes the class here
    assert len({file.read_bytes() for file in albums[0].iterdir()}) == 9


def test_plan_has_each_adapter_once(adapters: dict[str, Path], tmp_path: Path) -> None:
    source = Source(path="run", model="toy", adapters={**adapters, "last": Path("result.safetensors")})
    entries = plan(source, None, (1.0, 0.5, 0.0), updates=150)
    assert [(one.update, one.scale) for one in entries] == [(0, 0), (50, 0.5), (50, 1), (100, 0.5), (100, 1),
                                                            (150, 0.5), (150, 1)]  # fmt: skip
    assert [one.label for one in plan(source, None, (1.0,), updates=200)] == [None, "50", "100", "150", "last"]
    unfinished = Source(path="run", model="toy", adapters={**adapters, "last": adapters["150"]})
    assert [one.update for one in plan(unfinished, None, (1.0,), updates=800)] == [0, 50, 100, 150]
    for update, names in ((100, ["50", "100", "150"]), (120, ["50", "100", "best", "150"])):
        metadata = Best(update=update, loss=0.1, measured="").metadata
        write_safetensors(tmp_path / "best.safetensors", {"x": mx.zeros(1)}, metadata)
        kept = Source(path="run", model="toy", adapters={**adapters, "best": tmp_path / "best.safetensors"})
        assert [one.name for one in plan(kept, None, (1.0,), updates=150)[1:]] == names
    with pytest.raises(SettingsError, match="--scale"):
        plan(source, None, (0.0,), updates=150)
    full = Source(path="run", model="toy")
    assert [one.name for one in plan(full, None, (1.0,), updates=150)] == ["untrained", "last"]
    with pytest.raises(SettingsError, match="all weights"):
        plan(full, None, (0.5,), updates=150)
