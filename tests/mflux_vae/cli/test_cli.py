"""``mflux-vae``: what comes out, what is done again and what is not, how it ends, and that it answers at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mflux_vae import VAE
from mflux_vae.cli import commands, latent_file
from mflux_vae.errors import ImageError
from mflux_vae.image_files import profiles
from mflux_vae.images import image_text, load_image, save_image
from tests.conftest import Run
from tests.helpers.program import answered
from tests.mflux_vae.small_models import small_kl

SIZES = {"a.png": (24, 32), "b.png": (17, 9), "c.jpg": (40, 16)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    VAE(network=small_kl()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, size in SIZES.items():
        save_image(tmp_path / "photos" / name, draw.integers(0, 256, (*size, 3), dtype=np.uint8))
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def test_pictures_to_latents_and_back(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "made" / "latents.safetensors", tmp_path / "out"
    status, stdout, err = run("encode", photos, "--model", model, "--output", file)
    assert status == 0 and "3 of them new" in stdout, err
    vae = VAE.from_pretrained(model)
    entries, settings = latent_file.read(file)
    assert list(entries) == list(SIZES) and settings["model"] == str(model)
    for name, entry in entries.items():
        picture = load_image(photos / name)
        assert entry.size == SIZES[name] == picture.shape[:2]
        expected = vae.encode(mx.array(picture.transpose(2, 0, 1)[None]))[0]
        np.testing.assert_allclose(entry.latents, expected, atol=1e-5)
    assert sorted(path.name for path in file.parent.iterdir()) == ["latents.safetensors"]

    status, stdout, err = run("decode", file, "--output", out)  # with the model that the file names
    assert status == 0 and "3 of them new" in stdout, err
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]
    for name, entry in entries.items():
        picture = load_image(out / f"{Path(name).stem}.png")
        expected = vae.decode(entry.latents[None], size=entry.size)[0]
        assert picture.shape[:2] == SIZES[name]
        np.testing.assert_allclose(picture.transpose(2, 0, 1), expected, atol=0.51)
    assert "0 of them new" in run("decode", file, "--output", out)[1]
    again = run("decode", file, "--output", out, "--tiling", "blend", "--tile", 16)
    assert again[0] == 0 and "3 of them new" in again[1], again


def test_one_line_says_what_was_converted_or_ignored(run: Run, model: Path, tmp_path: Path) -> None:
    profile = profiles.matrix_profile("Display P3", profiles.DISPLAY_P3, profiles.SRGB_CURVE)
    (tmp_path / "photos").mkdir()
    for index in range(5):
        photo = Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8))
        photo.save(tmp_path / "photos" / f"{index}.jpg", icc_profile=profile)
        photo.save(tmp_path / "photos" / f"{index}.gif", save_all=True, append_images=[photo.rotate(90)])
    for command in ("encode", "reconstruct"):
        out = tmp_path / ("a.safetensors" if command == "encode" else "out")
        status, stdout, err = run(command, tmp_path / "photos", "--model", model, "--output", out)
        assert status == 0 and stdout.count("Display P3") == 1 and "0.jpg" in stdout
        assert err.count("frames") == 1 and "0.gif" in err and "2 more" in err
    assert "Display P3" not in run("reconstruct", tmp_path / "photos", "--model", model, "--json")[1]


def test_convert_replaces_files_only_if_told(run: Run, model: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "vae.safetensors", tmp_path / "folder"
    folder.mkdir()
    for target, taken in ((file, file), (folder, folder / "config.json")):
        taken.write_text("mine")
        status, _, err = run("convert", model, target)
        assert status == 2 and f"{taken} exists; give --overwrite" in err, err
        assert taken.read_text() == "mine" and [*folder.iterdir()] == [folder / "config.json"] * (target == folder)
        status, _, err = run("convert", model, target, "--overwrite")
        assert status == 0 and VAE.from_pretrained(target).config == VAE.from_pretrained(model).config, err


def test_interrupted_encode_resumes(
    run: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "latents.safetensors"
    command = ("encode", photos, "--model", model, "--output", file)
    encode, encoded = VAE.encode, []

    def counted(vae: VAE, image: mx.array, **settings: object) -> mx.array:
        if len(encoded) == stop:
            raise KeyboardInterrupt
        encoded.append(tuple(image.shape[2:]))
        return encode(vae, image, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(VAE, "encode", counted)
    stop = 2
    status, stdout, err = run(*command)
    assert (status, stdout, err) == (130, "", "mflux-vae: interrupted\n")
    assert not file.exists()
    stop = -1
    assert "1 of them new" in run(*command)[1]
    assert encoded == list(SIZES.values())
    assert "0 of them new" in run(*command)[1] and len(encoded) == 3
    whole = file.read_bytes()

    save_image(photos / "b.png", np.zeros((8, 8, 3), np.uint8))  # another picture of the same name
    assert "1 of them new" in run(*command)[1] and encoded[3:] == [(8, 8)] and file.read_bytes() != whole
    (photos / "a.png").unlink()
    assert "0 of them new" in run(*command)[1] and list(latent_file.read(file)[0]) == ["b.png", "c.jpg"]
    assert "2 of them new" in run(*command, "--tiling", "off")[1]  # other settings, other latents


def test_images_of_earlier_runs_are_named(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "latents.safetensors", tmp_path / "out"
    encode, decode = ("encode", "--model", model, "--output", file), ("decode", file, "--output", out)
    save_image(out / "photo.png", np.zeros((8, 8, 3), np.uint8))  # not ours, so not named
    run(*encode, photos)
    assert run(*decode)[2] == ""
    err = run(*encode, photos / "a.png")[2]
    assert "drops" in err and "2 images" in err and "b.png, c.jpg" in err and "a.png" not in err
    err = run(*decode)[2]
    assert "keeps 2 images" in err and "b.png, c.png" in err and "photo" not in err
    save_image(photos / "a.png", np.zeros((8, 8, 3), np.uint8))  # another image of the same name
    assert "drops" not in run(*encode, photos / "a.png")[2]
    assert "replacing 1 image of another input" in run(*decode)[2]
    err = run(*encode, photos / "b.png", "--tiling", "off")[2]
    assert "replacing" in err and "1 of images not given now: a.png" in err and "drops" not in err

    command = ("reconstruct", "--model", model, "--output", out)
    assert "keeps" not in run(*command, photos / "b.png")[2]  # files of decode are of another kind
    _, stdout, err = run(*command, photos / "c.jpg")
    assert stdout.endswith(f"{out}: 1 image\n") and "keeps 1 image" in err and "b.png" in err


def test_info_describes_latent_files(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    run("encode", photos, "--model", model, "--output", file)
    status, stdout, err = run("info", file)
    assert status == 0 and "latents of 3 images" in stdout and str(model) in stdout and "c.jpg" in stdout, err
    answer = json.loads(run("info", file, "--json")[1])
    assert answer["pictures"]["b.png"] == {"size": [17, 9], "latents": [4, 3, 2]}
    assert answer["settings"]["model"] == str(model)


def test_info_names_registered_presets(run: Run) -> None:
    assert "preset tiny" in run("info", "tiny")[1]
    assert json.loads(run("info", "tiny", "--json")[1])["preset"] == "tiny"


def test_what_a_crash_left_behind_is_made_again(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    parts = tmp_path / ".latents.safetensors.parts"
    parts.mkdir()
    (parts / "0123.safetensors").write_bytes(b"cut")
    status, stdout, err = run("encode", photos / "a.png", photos / "b.png", "--model", model, "--output", file)
    assert status == 0 and "2 of them new" in stdout and not parts.exists(), err


def test_only_our_files_are_overwritten(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert run("encode", photos, "--model", model, "--output", file)[0] == 0
    for command in (("decode", file), ("reconstruct", photos, "--model", model)):
        status, _, err = run(*command, "--output", photos)
        assert status == 2 and "a.png" in err, err
    weights = model / "diffusion_pytorch_model.safetensors"
    status, _, err = run("encode", photos, "--model", model, "--output", weights)
    assert status == 2 and f"{weights} was not written" in err
    assert before == {path: path.read_bytes() for path in photos.iterdir()}


def test_names_of_several_folders_and_kinds(run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("x/a.png", "x/a.jpg", "y/a.png"):
        save_image(tmp_path / name, np.full((8, 8, 3), 9, np.uint8))
    file, x, y = tmp_path / "latents.safetensors", tmp_path / "x", tmp_path / "y"
    assert run("encode", x, y, "--model", model, "--output", file)[0] == 0
    assert list(latent_file.read(file)[0]) == ["x/a.jpg", "x/a.png", "y/a.png"]
    assert run("decode", file, "--output", tmp_path / "out")[0] == 0
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert made == ["x/a.jpg.png", "x/a.png.png", "y/a.png"]
    status, _, err = run("encode", x / "a.png", y / "a.png", "--model", model, "--output", file)
    assert status == 2 and "a.png" in err
    assert run("encode", x, x / "a.png", "--model", model, "--output", file)[0] == 0  # one picture twice is one


def test_latent_file_cannot_name_files_elsewhere(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    for name in ("../a.png", "/tmp/a.png", "a/../../b.png", "", "a//b.png"):
        latent_file.write(file, {name: latent_file.Entry(mx.zeros((4, 1, 1)), (8, 8), 0)}, {"model": str(model)})
        status, _, err = run("decode", file, "--output", tmp_path / "out")
        assert status == 2 and "not a valid image name" in err and not (tmp_path / "out").exists()


def test_latents_of_other_weights_are_decoded_with_a_warning(
    run: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    file, other = tmp_path / "latents.safetensors", tmp_path / "other"
    assert run("encode", photos, "--model", model, "--output", file)[0] == 0
    VAE(network=small_kl(seed=1)).save_pretrained(other)
    status, _, err = run("decode", file, "--model", other, "--output", tmp_path / "out")
    assert status == 0 and "warning:" in err and "other weights" in err
    VAE(network=small_kl(latent_channels=8)).save_pretrained(other)
    status, _, err = run("decode", file, "--model", other, "--output", tmp_path / "out2")
    assert status == 2 and "expected (B, 8, h, w)" in err and str(file) in err


def test_files_of_another_model_are_replaced_with_a_warning(
    run: Run, model: Path, photos: Path, tmp_path: Path
) -> None:
    other, out, file = tmp_path / "other", tmp_path / "out", tmp_path / "latents.safetensors"
    VAE(network=small_kl(seed=1)).save_pretrained(other)
    commands = (
        (("encode", photos, "--output", file), file.name, "--model"),
        (("reconstruct", photos, "--output", out), "3 images", "--model"),
        (("compare", "--images", photos, "--output", tmp_path / "compared"), "comparison.png", None),
    )
    for words, name, flag in commands:
        for given, expected in ((model, False), (model, False), (other, True)):
            model_words = (flag, given) if flag else (given,)
            status, _, err = run(words[0], *model_words, *words[1:])
            assert status == 0 and ("replacing" in err) == expected and (name in err) >= expected, err
    for given, expected in ((other, False), (other, False), (model, True)):
        status, _, err = run("decode", file, "--model", given, "--output", tmp_path / "decoded")
        assert status == 0 and ("replacing 3 images" in err) == expected, err


def test_reconstruct_shows_and_measures(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, err = run("reconstruct", photos, "--model", model, "--output", out, "--amplify", 2)
    assert status == 0, err
    assert all(word in stdout for word in ("a.png", "24x32", "PSNR", "SSIM", "mean of 3"))
    vae, picture = VAE.from_pretrained(model), load_image(photos / "b.png")
    again = np.rint(np.array(vae(mx.array(picture.transpose(2, 0, 1)[None]))[0][0])).transpose(1, 2, 0)
    sheet = load_image(out / "b.png")
    height, width = SIZES["b.png"]
    left, middle, right = sheet[:, :width], sheet[:, width + 4 : -width - 4], sheet[:, -width:]
    assert sheet.shape == (height, 3 * width + 8, 3)
    assert np.array_equal(left, picture) and np.array_equal(middle, again)
    assert np.array_equal(right, np.clip(2 * np.abs(picture - again), 0, 255))

    status, stdout, err = run("reconstruct", photos, "--model", model, "--json")
    answer = json.loads(stdout)
    assert [row["name"] for row in answer["pictures"]] == list(SIZES)
    psnr = 10 * np.log10(255**2 / np.mean((picture - again) ** 2))
    assert answer["pictures"][1]["psnr"] == pytest.approx(psnr, abs=1e-3)
    assert -1 <= answer["mean"]["ssim"] <= 1 and answer["pictures"][1]["height"] == height


def test_a_perfect_reconstruction_has_no_number_of_decibels(
    run: Run, model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VAE, "__call__", lambda vae, image, tiling=None: (image.astype(mx.float32), None))
    answer = json.loads(run("reconstruct", photos, "--model", model, "--json")[1])
    assert {row["psnr"] for row in answer["pictures"]} == {answer["mean"]["psnr"]} == {None}
    assert "inf" in run("reconstruct", photos, "--model", model)[1]


def test_failures_end_with_one_line(
    run: Run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[malloc] cannot\nallocate")

    command = ("encode", photos, "--model", model, "--output", tmp_path / "latents.safetensors")
    for failure, word in ((full, "No space left on device"), (broken, "RuntimeError: [malloc] cannot allocate")):
        monkeypatch.setattr(latent_file, "write", failure)
        status, _, err = run(*command)
        assert status == 1 and err.count("\n") == 1 and word in err
    with pytest.raises(RuntimeError):
        run(*command, "--debug")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["encod", "photos"], "did you mean encode?"),
        (["encode", "photos", "--modl", "sd1"], "unknown flag --modl; did you mean --model?"),
        (["train", "--latent-dmi=3"], "unknown flag --latent-dmi; did you mean --latent-dim?"),
    ],
)
def test_unknown_flags_are_reported_before_missing_ones(run: Run, words: list[str], word: str) -> None:
    status, _, err = run(*words)
    assert status == 2 and word in err and err.count("\n") == 1 and "required" not in err


def test_latents_are_not_written_as_an_image(run: Run, photos: Path) -> None:
    status, _, err = run("encode", photos, "--model", "sd1", "--output", photos / "a.png")
    assert status == 2 and "a.safetensors" in err


def test_subfolders_are_not_searched(run: Run, photos: Path) -> None:
    status, _, err = run("encode", photos.parent, "--model", "sd1", "--output", photos / "latents.safetensors")
    assert status == 2 and "no images" in err and "subfolders" in err


def test_debug_tells_shapes(run: Run, model: Path, photos: Path) -> None:
    quiet, loud = (run("reconstruct", photos / "a.png", "--model", model, *flags)[2] for flags in ((), ("--debug",)))
    assert "(1, 24, 32, 3)" in loud and "MB" in loud and "MB" not in quiet


def test_what_is_not_from_here_is_told_from_what_is(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        (tmp_path / "x.png").write_bytes(b"none")
        image_text(tmp_path / "x.png")
    assert commands.MARK not in image_text(Path(__file__).parents[3] / "mflux_vae_train/pipelines/tiny/example/0.png")


# as a program


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "import sys; from mflux_vae.cli import main; sys.exit(main())", *map(str, arguments)]


def test_help_is_answered_at_once_and_loads_nothing_heavy() -> None:
    said, seconds = answered(program("--help"))
    assert "reconstruct" in said and seconds < 0.5
    code = "import sys; from mflux_vae.cli import main; main(['encode', '--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"numpy", "PIL", "tqdm", "transformers", "torch"}


def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(model: Path, tmp_path: Path) -> None:
    for index in range(40):
        save_image(tmp_path / "many" / f"{index}.png", np.full((256, 256, 3), index, np.uint8))
    out = tmp_path / "out" / "latents.safetensors"
    command = program("encode", tmp_path / "many", "--model", model, "--output", out)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background would inherit deafness
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MKL_NUM_THREADS": "1"})
    signal.signal(signal.SIGINT, before)
    parts = out.with_name(f".{out.name}.parts")
    deadline = time.monotonic() + 600  # a busy machine
    while not list(parts.glob("[0-9a-f]*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "mflux-vae: interrupted"
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "40 images" in done.stdout and "40 of them new" not in done.stdout, done.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    code = "import sys; from mflux_vae.cli import main; sys.exit(main(['info']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=60, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_are_the_same_where_the_locale_is_not_utf_8(tmp_path: Path, model: Path) -> None:
    save_image(tmp_path / "é⭐" / "狗.png", np.zeros((16, 16, 3), np.uint8))
    command = program("reconstruct", tmp_path / "é⭐", "--model", model, "--output", tmp_path / "out ⭐")
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out ⭐").iterdir()] == ["狗.png"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_file_name_that_is_not_utf_8_is_encoded_and_decoded(tmp_path: Path, model: Path, run: Run) -> None:
    name = os.fsdecode(b"caf\xe9")
    draw = np.random.default_rng(0)
    save_image(tmp_path / f"{name}.png", draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    file = tmp_path / f"{name}.safetensors"
    assert run("encode", tmp_path / f"{name}.png", "--output", file, "--model", model)[0] == 0
    assert run("decode", file, "--output", tmp_path / "out")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["caf\\xe9.png"]
