"""``mflux-dreambooth draw`` after a run of the fake pipeline, and of an embedded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae.images import image_text, load_image, save_image
from mflux_vae_train.dreambooth import commands
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.drawing import adapted
from mflux_vae_train.dreambooth.drawing.draw import TEXT_KEY
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.fingerprint import file_hash
from mflux_vae_train.pipelines import tiny
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.conftest import subject

ADAPTER = "pytorch_lora_weights.safetensors"
PROMPTS = ("a photo of sks dog", "sks dog in snow")


@pytest.fixture
def opened(monkeypatch) -> list[FakePipeline]:
    """The pipelines that the command opens."""
    pipelines: list[FakePipeline] = []

    def open_pipeline(model: str, **options: Any) -> FakePipeline:
        assert model == "fake" and not any(options.values())
        pipelines.append(FakePipeline())
        return pipelines[-1]

    monkeypatch.setattr(adapted, "open_pipeline", open_pipeline)
    return pipelines


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with previews before and after its updates."""
    root = tmp_path_factory.mktemp("trained")
    save_image(root / "instance" / "0.png", subject(0))
    given = {"model": "fake", "instance_data_dir": str(root / "instance"), "instance_prompt": PROMPTS[0]}
    short = {"max_train_steps": 6, "validation_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": None}
    short |= {"num_validation_images": 3, "validation_prompt": PROMPTS, "prior_preservation": "none"}
    out = root / "out"
    DreamBooth(FakePipeline()).train(DreamBoothSettings(**given, **short, output_dir=str(out), lr_warmup_steps=1))
    return out


@pytest.fixture
def draw(capsys):
    """Runs the command: arguments -> exit status, standard output, standard error."""

    def main(*arguments: object) -> tuple[int, str, str]:
        status = commands.main(["draw", *map(str, arguments)])
        return status, *capsys.readouterr()

    return main


@pytest.fixture
def drawn(draw):
    """Runs the command successfully; returns what it prints as JSON."""

    def main(*arguments: object) -> dict[str, Any]:
        status, out, err = draw(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return main


def test_without_flags_the_last_preview_is_drawn_again(trained, drawn, opened) -> None:
    answer = drawn(trained)
    files = [load_image(picture["file"]) for picture in answer["pictures"]]
    rows = [np.concatenate(files[start : start + 3], axis=1) for start in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), load_image(trained / "samples" / "step-00006.png"))
    assert Path(answer["sheet"]) == trained / "drawn" / "001.png" and len(opened) == 1
    untrained = drawn(trained, "--scale", 0, "--images", 3)["pictures"]
    rows = [np.concatenate([load_image(one["file"]) for one in untrained[s : s + 3]], axis=1) for s in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), load_image(trained / "samples" / "step-00000.png"))


def test_a_sheet_of_checkpoints_and_scales(trained, drawn, opened, tmp_path) -> None:
    wanted = ("--prompt", "sks dog", "--checkpoint", 2, "last", "--scale", 0.5, 1, "--compare_base", "--seed", 3)
    answer = drawn(trained, *wanted, "--output", tmp_path / "sheet.png")
    names = sorted(path.name for path in (tmp_path / "sheet").iterdir())
    scales = [f"{model}-scale{scale}.png" for model in ("checkpoint2", "last") for scale in ("0.5", "1")]
    assert names == sorted(["untrained.png", *scales])
    assert sorted(picture["file"] for picture in answer["pictures"]) == [
        str(tmp_path / "sheet" / name) for name in names
    ]
    assert opened[0].images_sampled == 5, "the untrained model draws once for both checkpoints"
    text = json.loads(image_text(tmp_path / "sheet" / "checkpoint2-scale0.5.png")[TEXT_KEY])
    adapter = file_hash(trained / "checkpoint-2" / ADAPTER)
    assert text | {"prompt": "sks dog", "seed": 3, "scale": 0.5, "checkpoint": "2", "adapter_sha256": adapter} == text
    assert text | {"model": "fake", "steps": 3, "guidance": 1.5, "height": 16, "width": 16} == text
    sheet = json.loads(image_text(tmp_path / "sheet.png")[TEXT_KEY])
    assert sheet["rows"] == ["checkpoint 2", "last"] and sheet["columns"] == ["untrained", "scale 0.5", "scale 1"]


def test_one_picture_is_one_file_and_files_are_numbered(trained, draw, opened, tmp_path) -> None:
    place = tmp_path / "pictures"
    for number in (1, 2):
        status, out, _ = draw(trained / ADAPTER, "--prompt", "[trigger] dog", "--images", 1, "--output", place)
        assert status == 0 and out.strip() == str(place / f"00{number}.png")
    assert json.loads(image_text(place / "002.png")[TEXT_KEY])["prompt"] == "sks dog"
    status, _, err = draw(trained, "--images", 1, "--output", place / "002.png")
    assert status == 2 and "exists" in err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--scale", "nan"), "--scale"),
        (("--seed", "-1"), "--seed"),
        (("--images", "0"), "--images"),
        (("--steps", "0"), "--steps"),
        (("--guidance", "-1"), "--guidance"),
        (("--size", "16", "32", "48"), "--size"),
        (("--size", "18"), "multiples of 4"),
        (("--prompt", " "), "empty"),
        (("--prompt", "\udcff"), "UTF-8"),
        (("--checkpoint", "3"), "2, 4, 6, last"),
        (("--negative_prompt", "blurry"), "does not offer"),
        (("--quantize", "4"), "does not offer"),
        (("--output", "a.jpg"), "PNG"),
        (("--output", "settings.yaml/x"), "is a file"),
        (("--strength", "1"), "unknown flag"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_drawn(flags, word, trained, draw, opened, monkeypatch) -> None:
    monkeypatch.chdir(trained)
    before = [*trained.iterdir()]
    status, _, err = draw(trained, *flags)
    assert status == 2 and word in err and len(err.splitlines()) == 1
    assert not any(pipeline.images_sampled for pipeline in opened) and [*trained.iterdir()] == before


def test_images_of_one_colour_are_counted(trained, draw, opened, monkeypatch, tmp_path) -> None:
    def black(self, *_, **options):
        return np.zeros((1, 16, 16, 3), np.uint8)

    monkeypatch.setattr(adapted.Adapted, "draw", black)
    _, _, err = draw(trained, "--images", 1, "--output", tmp_path)
    assert "2 of 2 images are one colour" in err


def test_the_embedded_pipeline_draws_the_preview_again(drawn, tmp_path) -> None:
    images = Path(tiny.__file__).parent / "example"
    given = {"instance_data_dir": str(images), "instance_prompt": "a photo of xyz star", "model": "tiny", "rank": 2}
    short = {"max_train_steps": 2, "gradient_accumulation_steps": 1, "num_inference_steps": 1, "resolution": 32}
    short |= {"num_validation_images": 2, "validation_steps": 2, "prior_preservation": "none", "lr_warmup_steps": 0}
    out = tmp_path / "run"
    DreamBooth(tiny.load()).train(DreamBoothSettings(**given, **short, output_dir=str(out), learning_rate=1e-2))
    before, after = (load_image(out / "samples" / f"step-0000{update}.png") for update in (0, 2))
    assert not np.array_equal(before, after)
    pictures = drawn(out, "--compare_base", "--images", 2)["pictures"]
    for scale, preview in ((0, before), (1, after)):
        images = [load_image(one["file"]) for one in pictures if one["scale"] == scale]
        np.testing.assert_array_equal(np.concatenate(images, axis=1), preview)
