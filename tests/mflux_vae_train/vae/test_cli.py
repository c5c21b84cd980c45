"""``mflux-vae train`` and its companions: every flag sets its field, every command writes its picture."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import typing
from argparse import ArgumentParser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae import VAE, cli
from mflux_vae.errors import SettingsError
from mflux_vae.images import load_image, save_image
from mflux_vae_train.settings.fields import field_type, is_tuple
from mflux_vae_train.settings.flags import add_flags, from_yaml, settings_of, to_yaml
from mflux_vae_train.vae.config import PRESETS, VAETrainingSettings, preset
from tests.conftest import Run
from tests.mflux_vae.small_models import small_kl

FIELDS = {field.name: field for field in dataclasses.fields(VAETrainingSettings)}
HINTS = typing.get_type_hints(VAETrainingSettings)
TINY = ("--image_size=12", "--hidden_dims", "4", "6", "--latent_dim=3", "--digits_count=20", "--batchsize=8")


def settings(*words: str) -> VAETrainingSettings:
    parser = ArgumentParser()
    add_flags(parser, VAETrainingSettings, PRESETS)
    return settings_of(VAETrainingSettings, vars(parser.parse_args(words)), PRESETS)


def other_than_default(name: str) -> Any:
    field, (kind, _) = FIELDS[name], field_type(HINTS[name])
    if choices := field.metadata["choices"]:
        return next(choice for choice in choices if choice != field.default)
    if is_tuple(HINTS[name]):
        return ("some text", "more") if kind is str else (7, 5)
    if kind is bool:
        return not field.default
    if kind is str:
        return "some text"
    if name == "in_channels":
        return 3
    return 16 if kind is int else 0.25


@pytest.mark.parametrize("name", [n for f in FIELDS.values() for n in (f.name, *f.metadata["aliases"])])
def test_every_flag_reaches_its_field(name: str, tmp_path: Path) -> None:
    field = name if name in FIELDS else next(f.name for f in FIELDS.values() if name in f.metadata["aliases"])
    value = other_than_default(field)
    if isinstance(value, bool):
        words = [f"--{name}" if value else f"--no_{name}"]
    else:
        words = [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    assert getattr(settings(*words), field) == value
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(settings(*words)))
    assert from_yaml(VAETrainingSettings, path) == settings(*words) == settings("--config", str(path))


@pytest.mark.parametrize("name", PRESETS)
def test_flags_override_presets(name: str) -> None:
    assert settings("--preset", name) == preset(name)
    assert settings("--preset", name, "--lr", "0.5") == preset(name, learning_rate=0.5)


def test_the_nearest_preset_is_suggested() -> None:
    for build in (preset, lambda name: settings("--preset", name)):
        with pytest.raises(SettingsError, match="did you mean mnist"):
            build("mnsit")


def test_a_preset_flag_overrides_the_preset_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("preset: beta\nlatent_dim: 3\n")
    assert settings("--config", str(tmp_path / "run.yaml")) == preset("beta", latent_dim=3)
    assert settings("--config", str(tmp_path / "run.yaml"), "--preset", "tc") == preset("tc", latent_dim=3)


def test_command_lines_of_other_projects() -> None:
    one = settings("--experiment_name", "my_beta_vae", "--loss_type", "beta_vae", "--beta_end", "4.0")
    assert one == preset("beta", experiment_name="my_beta_vae")
    line = "--experiment_name custom_vae --latent_dim 64 --hidden_dims 32 64 128 --learning_rate 1e-4 --batch_size 256"
    two = settings(*line.split())
    assert (two.latent_dim, two.hidden_dims, two.learning_rate, two.batch_size) == (64, (32, 64, 128), 1e-4, 256)
    assert settings("--hidden_dims", "32,64,128") == settings("--hidden_dims", "32", "64", "128")
    line = "--preset mlx-mnist --cpu --seed 3 --batchsize 64 --max_filters 128 --epochs 5 --lr 0.01 --latent_dims 16"
    three = settings(*line.split())
    assert (three.cpu, three.seed, three.batch_size, three.num_epochs, three.learning_rate) == (True, 3, 64, 5, 0.01)
    assert three.widths == (32, 64, 128) and three.name == "vae_digits_filters_0128_dims_0016"


def test_a_second_model_does_not_replace_the_pictures_of_the_first(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        VAE(network=small_kl()).save_pretrained(folder)
    for command, name in (("sample", "samples"), ("grid", "latent_grid"), ("interpolate", "interpolation")):
        words = (command, f"--output_dir={tmp_path}", *([] if command == "grid" else ["--image_size=16"]))
        if command == "grid":
            save_image(tmp_path / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
            status, _, err = run(*words, f"--model={first}")
            assert status == 2 and f"{name}.png exists" in err
            continue
        for _ in range(2):
            assert run(*words, f"--model={first}")[0] == 0
        before = (tmp_path / f"{name}.png").read_bytes()
        status, _, err = run(*words, f"--model={second}")
        assert status == 2 and f"{first}" in err and "--output_dir" in err
        assert (tmp_path / f"{name}.png").read_bytes() == before
        assert run(*words, f"--model={second}", f"--outfile={tmp_path}/{name}-2.png")[0] == 0


def test_train_then_sample(run: Run, tmp_path: Path) -> None:
    command = ("train", "--experiment_name=mine", f"--output_dir={tmp_path}", "--epochs=1", *TINY)
    status, out, err = run(*command)
    assert status == 0, err
    assert "18 images" in out and "2 updates" in out
    assert re.search(r"epoch 1 of 1, held out: loss .*, KL \S+ nats, PSNR \S+ dB, .* of 3 units active", out), out
    assert run(*command)[0] == 0
    model = tmp_path / "checkpoints" / "mine" / "best_model.safetensors"

    output = tmp_path / "output"
    row = 12 + 2
    for words, file, rows, columns in (
        (("sample", "--num_samples=6"), "samples", 2, 3),
        (("grid", "--grid_size=4", "--latent_range_min=-4.0", "--latent_range_max=4.0"), "latent_grid", 4, 4),
        (("interpolate", "--num_steps=7", "--spherical", "--latent_dims=3"), "interpolation", 1, 7),
        (("interpolate", "--images", f"{output}/samples.png", f"{output}/latent_grid.png"), "interpolation", 1, 10),
    ):
        status, out, err = run(*words, f"--model_path={model}", f"--output_dir={output}")
        assert status == 0 and out.strip() == str(output / f"{file}.png"), err
        assert load_image(out.strip()).shape == (rows * row - 2, columns * row - 2, 3)
    for words, units in (
        (("--num_steps=5",), 3),
        (("--dims", "2", "--num_steps=5", f"--image={output}/samples.png"), 1),
    ):
        status, out, err = run("traverse", *words, f"--model_path={model}", f"--output_dir={output}")
        assert status == 0 and out.strip() == str(output / "traversal.png"), err
        height, width, _ = load_image(out.strip()).shape
        assert height == 4 + units * (5 * 12 + 4) and width > 5 * (5 * 12 + 2)  # enlarged, with labels on the left
    assert run("sample", "--model", model, "--outfile", tmp_path / "samples.png", "--seed=1")[0] == 0
    assert (load_image(tmp_path / "samples.png") != load_image(output / "samples.png")[:1, :1]).any()

    status, out, err = run("sample", "--model", model, "--outdir", output, "--grid_size=3", "--nimg_channels=1")
    assert status == 0 and out.split() == [str(output / "samples.png"), str(output / "latent_grid.png")], err
    assert load_image(output / "latent_grid.png").shape == (3 * row - 2,) * 2 + (3,)
    status, _, err = run("sample", "--model", model, "--max_filters=64")
    assert status == 2 and "--max_filters" in err

    for words, count, kind in ((("--rec_testdata",), 2, "held-out"), ((), 18, "training")):
        status, out, err = run("reconstruct", f"--model_path={model}", f"--outdir={output}", *words)
        assert status == 0 and out.startswith(f"{count} {kind} images: PSNR"), err
        assert load_image(output / "reconstructions.png").shape[0] == (2 if words else 6) * row - 2
    status, out, err = run("reconstruct", "--model", model, "--data", "digits", "--json", "--num_images=5")
    assert status == 0 and json.loads(out)["images"] == 5, err

    save_image(tmp_path / "grey.png", load_image(output / "samples.png")[:12, :12])
    status, out, err = run("reconstruct", tmp_path / "grey.png", "--model", model, "--latent_dims=3")
    assert status == 0 and "grey.png" in out, err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("train", "--learning_rte=1"), "--learning_rte"),
        (("train", "--preset=none"), "mnist"),
        (("train", "--latent_dim=0"), "at least 1"),
        (("train", "--data=nowhere"), "nowhere"),
        (("sample", "--model_path=nowhere"), "nowhere"),
        (("sample",), "--model_path"),
        (("sample", "--model_path=nowhere", "--num_samples=0"), "nowhere"),
        (("reconstruct", "a.png", "--rec_testdata", "--model=tiny"), "--rec_testdata"),
        (("reconstruct", "--model=tiny"), "--data"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Run, words: tuple[str, ...], key: str) -> None:
    status, _, err = run(*words)
    assert status == 2 and key in err and len(err.splitlines()) == 1


def test_broken_and_duplicate_commands_are_skipped_with_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("info", "nowhere:info", cli.GROUP),
        EntryPoint("broken", "nowhere:run", cli.GROUP),
        EntryPoint("sample", "mflux_vae_train.vae.cli:sample", cli.GROUP),
        EntryPoint("sample", "other:sample", cli.GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    status, _, err = run("sample")
    assert status == 2 and "--model_path" in err
    for key in ("command info", "command broken", "other:sample"):
        assert key in err


def test_built_in_commands_do_not_load_plugins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: pytest.fail("plugins loaded"))
    for name in cli.BUILTIN:
        assert run(name, "--no-such-flag")[0] == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mflux_vae.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--loss_type" in done.stdout
    assert not {"transformers", "torch", "mlx_lm", "numpy", "PIL", "yaml", "tensorboard"} & set(done.stderr.split())
