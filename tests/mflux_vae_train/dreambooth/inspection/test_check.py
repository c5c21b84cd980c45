"""``mflux-dreambooth check``: what it says is what a run sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.images import load_image, save_image
from mflux_vae.previews import synthetic_images
from mflux_vae_train.dreambooth.commands import main
from mflux_vae_train.dreambooth.inspection.captions import class_words
from mflux_vae_train.dreambooth.inspection.exposure import exposure_remarks
from mflux_vae_train.dreambooth.inspection.sheet import TEXT_KEY

PHOTOS = Path(__file__).parents[5] / "shared" / "data" / "dreambooth"
"""Photographs of the DreamBooth data set, in a folder beside the checkout."""

PROMPT = ("--instance_prompt", "a photo of sks dog")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Five different images of 48 x 64, and the folder to write into as the current one."""
    monkeypatch.chdir(tmp_path)
    for index, picture in enumerate(synthetic_images(5, 64)):
        save_image(tmp_path / "dog" / f"{index}.png", picture.transpose(1, 2, 0)[:48])
    return tmp_path / "dog"


@pytest.fixture
def check(folder, capsys):
    """Runs the command with JSON: flags -> exit status, findings, last line of standard error."""

    def run(*flags: object, resolution: int = 48):
        status = main(["check", str(folder), "--json", "--resolution", str(resolution), *map(str, flags)])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return run


def remarks(found: dict) -> dict[str, list[str]]:
    return {Path(one["file"]).name: one["remarks"] for one in found["images"]}


def test_sound_images_give_no_warning_and_a_sheet(folder, check, capsys):
    status, found, err = check(*PROMPT)
    assert status == 0 and not found["warnings"] and not found["errors"] and not err
    assert found["sheet"] == str(folder.parent / "dog-check.png") and load_image(found["sheet"]).shape[2] == 3
    assert [one["kept"] for one in found["images"]] == [0.75] * 5 and not any(remarks(found).values())
    assert main(["check", str(folder), "--resolution", "48"]) == 0
    assert "'a photo of sks dog' is assumed" in capsys.readouterr().out


def test_all_broken_files_are_listed(folder, check):
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:80])
    (folder / "4.txt").write_bytes("sks dog".encode("utf-16"))
    status, found, err = check(*PROMPT)
    assert status == 2 and "2 more errors" in err
    for error, name in zip(found["errors"], ("1.png", "3.png", "4.txt"), strict=True):
        assert name in error
    assert [*remarks(found)] == ["0.png", "2.png", "4.png"]


def test_remarks_on_images(folder, check):
    picture = load_image(folder / "2.png")
    save_image(folder / "copy.png", picture[2:46, 62:3:-1])
    save_image(folder / "dark.png", picture // 8)
    save_image(folder / "tall.png", np.concatenate([picture[:, :20]] * 2))
    status, found, _ = check(*PROMPT, resolution=32)
    assert status == 0 and ["2.png", "copy.png"] in found["duplicates"]
    assert remarks(found)["tall.png"] == ["enlarged 1.6 times", "much cropped away"]
    assert "very dark" in remarks(found)["dark.png"] and not remarks(found)["4.png"]
    for word in ("nearly the same", "very dark", "use_aspect_ratio_buckets", "remove these files"):
        assert any(word in line for line in found["warnings"]), word


def test_advice_fits_the_settings_and_most_images(folder, check):
    for index in range(7):
        save_image(folder / f"half-{index}.png", np.full((300, 300, 3), 20 * index, np.uint8))
    save_image(folder / "wide.png", np.full((60, 300, 3), 9, np.uint8))
    flags = (*PROMPT, "--use_aspect_ratio_buckets")
    lines = "\n".join(check(*flags, resolution=512)[1]["warnings"])
    assert "--resolution 296" in lines and "loses" in lines and "use_aspect_ratio_buckets" not in lines
    assert "--resolution" not in "\n".join(check(*flags, resolution=256)[1]["warnings"])


def test_counts_agree(folder, check, capsys):
    (folder / "0.txt").write_text("a photo of sks dog asleep")
    (folder / "3.png").write_bytes(b"")
    save_image(folder / "below" / "one.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "empty").mkdir()
    assert any("3 of 4 images have no caption" in line for line in check(*PROMPT)[1]["warnings"])
    assert main(["check", str(folder), *PROMPT]) == 2
    assert "4 instance images" in (text := capsys.readouterr().out) and "2 other files and 1 subfolder" in text


@pytest.mark.parametrize(("words", "cure"), [((), "give the folder"), (("a", "b"), "one FOLDER (--help lists flags)")])
def test_one_folder_is_needed(words, cure, capsys):
    assert main(["check", *words]) == 2 and cure in capsys.readouterr().err


def test_captions_lack_words(folder, check):
    texts = ["a photo of sks dog", "[trigger] dogs asleep", "a dog", "sks asleep", "sks asleep"]
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    (folder / "5.txt").write_text("no image")
    _, found, _ = check(*PROMPT)
    shown = remarks(found)
    assert not shown["0.png"] and not shown["1.png"] and found["images"][1]["caption"] == "sks dogs asleep"
    assert shown["2.png"] == ["no 'sks' in caption"] and shown["3.png"] == ["no 'dog' in caption"]
    assert found["unused"][str(folder)] == {"caption without an image of that name": ["5.txt"]}
    for word in ("[trigger]", "'sks' of --instance_prompt is missing", "class word", "equal (3.png, 4.png)"):
        assert any(word in line for line in found["warnings"]), word


def test_masks_are_measured_and_black_ones_refused(folder, check):
    mask = np.zeros((48, 64, 1), np.uint8)
    save_image(folder / "1-mask.png", mask)
    mask[:24] = 255
    save_image(folder / "0-mask.png", mask)
    status, found, err = check(*PROMPT, "--masked_loss")
    assert status == 2 and "1-mask.png" in err and "black" in err
    assert found["images"][0]["mask"]["weight"] == pytest.approx(0.5, abs=0.01)
    assert check(*PROMPT)[0] == 0


def test_a_model_counts_tokens_and_a_file_gives_settings(folder, check, tmp_path):
    (tmp_path / "run.yaml").write_text("model: tiny\ninstance_prompt: a photo of sks dog\nrank: 4\nmasked_loss: true\n")
    (folder / "0.txt").write_text("a photo of sks dog " + "in the snow " * 20)
    status, found, _ = check("--config", "run.yaml", "--masked_loss", "false", resolution=64)
    assert status == 0 and not found["notes"] and any("cuts 1 of" in line for line in found["warnings"])
    assert check("--config", "run.yaml")[0] == 2
    assert main(["check", str(folder), *PROMPT, "--model", "tiny", "--resolution", "50"]) == 2


def test_only_its_sheets_are_replaced(folder, check, capsys):
    target = folder.parent / "dog-check.png"
    save_image(target, np.zeros((8, 8, 3), np.uint8))
    assert check(*PROMPT)[1]["sheet"].endswith("dog-check-1.png")
    assert check(*PROMPT)[1]["sheet"].endswith("dog-check-1.png")
    assert main(["check", str(folder), "--output", str(target)]) == 2
    assert main(["check", str(folder), "--output", str(folder / "sheet.png")]) == 2
    assert "image of the subject" in capsys.readouterr().err and load_image(target).shape == (8, 8, 3)
    save_image(target, np.zeros((8, 8, 3), np.uint8), text={TEXT_KEY: ""})
    assert check(*PROMPT)[1]["sheet"] == str(target)


def test_class_words():
    assert class_words("a photo of sks toy robot on a table", "sks") == ["toy", "robot"]
    assert class_words("a sks dog, running", "sks") == ["dog"]
    assert class_words("my dog", None) == []


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"there are no photographs in {PHOTOS}")
def test_photographs_raise_no_false_alarm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for subject in ("cat", "clock", "dog"):  # the darkest, brightest and softest ones
        assert main(["check", str(PHOTOS / subject), "--json", "--resolution", "128"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert not any(remarks(found).values()) and not found["duplicates"]
    blurred = np.zeros((256, 256, 3), np.uint8)
    blurred[:] = (np.sin(np.arange(256) / 8) * 100 + 120)[:, None, None]
    assert exposure_remarks(blurred) == ["blurred"]
