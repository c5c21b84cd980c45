"""``--help`` shows fifteen flags in groups, ``--help-all`` all; a command without flags names what it needs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mflux_vae import cli as vae_cli
from mflux_vae_train.dreambooth import cli
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.vae.config import VAETrainingSettings

COMMANDS = [(cli.main, [], DreamBoothSettings), (vae_cli.main, ["train"], VAETrainingSettings)]
ROOT = Path(__file__).parents[3]
GENERAL = {"config", "help-all", "debug", "preset"}


def printed(main: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("main", "words", "cls"), COMMANDS)
def test_help_shows_fifteen_flags_in_groups(
    main: Any, words: list[str], cls: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(main, [*words, "--help"], capsys)
    shown = {name for name in re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)} - GENERAL - {"help"}
    assert shown == {*cls.MAIN} and len(cls.MAIN) == 15
    assert len(re.findall(r"^[a-z ]+:$", text, re.MULTILINE)) >= 5 and "--help-all" in text
    every = printed(main, [*words, "--help-all"], capsys)
    assert all(f"  --{field.name}" in every for field in dataclasses.fields(cls))


def test_the_readme_names_the_main_flags() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Flags")[2].partition("\n## ")[0]
    assert not [name for name in DreamBoothSettings.MAIN if f"`--{name}`" not in section]


def test_without_flags_the_command_names_what_it_needs_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "missing: --model, --instance_data_dir, --instance_prompt" in line
    program, *words = shlex.split(line.partition("for example: ")[2])
    assert program == cli.PROG
    settings = settings_from(DreamBoothSettings, words)
    assert settings.model == "tiny" and len(list(Path(settings.instance_data_dir).glob("*.png"))) == 5


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--max_steps", "--max_train_steps"),
        ("--learning-rte", "--learning_rate"),
        ("--steps", "_steps"),
        ("--no_center_crp", "--no_center_crop"),
        ("--guidance_scal", "--guidance_scale"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(word: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "3"]) == 2
    assert f"unknown flag {word}; did you mean --" in (err := capsys.readouterr().err) and near in err
