"""Settings from files: mistakes name file, line and key. Paths: ``~`` is the home folder wherever a path is given."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mflux_vae import cli as vae_cli
from mflux_vae.errors import SettingsError
from mflux_vae.utils.paths import expand, file_name, printable
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.settings.flags import add_flags, from_yaml, settings_from, settings_of
from mflux_vae_train.vae.config import PRESETS, VAETrainingSettings

NEEDED = {"model": "tiny", "instance_data_dir": "pictures", "instance_prompt": "a photo of sks dog"}
WORDS = [f"--{name}={value}" for name, value in NEEDED.items()]


def read(text: str, tmp_path: Path, name: str = "run.yaml", *words: str) -> DreamBoothSettings:
    (tmp_path / name).write_text(text)
    return settings_from(DreamBoothSettings, [*WORDS, f"--config={tmp_path / name}", *words])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nrank: four", "run.yaml, line 2: --rank is 'four'"),
        ("\n\nrank: 0", "run.yaml, line 3: --rank is 0"),
        ("seed: 010", "run.yaml, line 1: seed"),
        ("learning_rate: 1e-4\nlearning-rate: 1e-3", "line 2: 'learning-rate' and 'learning_rate' .*line 1"),
        ("guidance: 2\nseed: 1\nguidance_scale: 3", "line 3: 'guidance_scale' and 'guidance' .*line 1"),
        ("model: a\npretrained_model_name_or_path: b", "line 2: .*'model' .*line 1"),
        ("output_dir: 2024", "line 1: --output_dir is 2024; text is allowed; put it in quotes"),
        ("output_dir: 2024-11-05", "line 1: output_dir: .*quotes"),
        ("instance_prompt: true", "quotes"),
        ("max_train_steps: 1_000", "line 1: max_train_steps"),
        ("concepts:\n- {instance_data_dir: a,\n   instance_prompt: b, repeats: 0}", "run.yaml, line 3: --repeats is 0"),
        ("concepts:\n- {instance_data_dir: a}", "run.yaml, line 2: --concepts: missing: instance_prompt"),
        ("concepts: [{instance-data-dir: a, instance_data_dir: b}]", "one setting"),
        ("center_crop: maybe", "line 1: --center_crop is 'maybe'"),
        ("prior_preservation: off", "line 1: --prior_preservation is 'off'"),
    ],
)
def test_mistakes_in_a_file_name_file_line_and_key(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        read(text, tmp_path)


@pytest.mark.parametrize(
    "text", ["{0}: 1", "rank: {0}", "concepts: [{{{0}: 1}}]", "? [{0}]\n: 1", "seed: 1\n{0}", "a: !{0} 1"]
)
def test_a_mistake_of_any_length_is_a_readable_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read(text.format("x" * 5000), tmp_path)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 450


def test_words_for_true_and_false_are_text_where_text_belongs(tmp_path: Path) -> None:
    settings = read("center_crop: off\nrandom_flip: yes\ninstance_prompt: on\noptimizer: AdamW\n", tmp_path)
    assert (settings.center_crop, settings.random_flip, settings.optimizer) == (False, True, "adamw")


@pytest.mark.parametrize("word", ["1_0e-4", "١", "0x10", "1e", ""])
def test_only_plain_decimal_numbers_are_numbers(word: str) -> None:
    with pytest.raises(SettingsError, match="--learning_rate"):
        settings_from(DreamBoothSettings, [*WORDS, f"--learning_rate={word}"])


def test_a_file_is_given_once_and_a_preset_says_what_the_file_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text("latent_dim: 3\nbeta: 2\n")
    config = f"--config={tmp_path / 'run.yaml'}"
    with pytest.raises(SettingsError, match="2 times"):
        settings_from(DreamBoothSettings, [*WORDS, config, config])
    parser = argparse.ArgumentParser()
    add_flags(parser, VAETrainingSettings, PRESETS)
    found = settings_of(VAETrainingSettings, vars(parser.parse_args([config, "--preset=kl-f8"])), PRESETS)
    assert (found.latent_dim, found.network) == (3, "kl")
    assert "--preset kl-f8 does not set latent_dim, beta" in caplog.text


def test_a_json_file_is_read_as_json(tmp_path: Path) -> None:
    assert read('{"learning-rate":\t1e-4, "seed": 3}', tmp_path, "run.json").learning_rate == 1e-4
    for text, words in (
        ('{"rank": 4,\n"rank": 8}', "run.json: .*line 2: 'rank'"),
        ('{"seed": 1,\n"rank": 0}', "run.json, line 2: --rank is 0"),
        ("rank: 4", "not valid JSON"),
        ('{"concepts": [{"instance_data_dir": "a", "instance_prompt": "b", "repeats": 1,\n"repeats": 2}]}', "line 2"),
    ):
        with pytest.raises(SettingsError, match=words):
            read(text, tmp_path, "run.json")


@pytest.mark.parametrize(
    "words", [["--guidance=3", "--guidance_scale=4"], ["--model=a", "--pretrained-model-name-or-path=b"]]
)
def test_two_names_of_one_flag_are_refused_and_of_one_name_the_last_counts(words: list[str]) -> None:
    with pytest.raises(SettingsError, match="one setting"):
        settings_from(DreamBoothSettings, WORDS + words)
    last = settings_from(
        DreamBoothSettings, [*WORDS, "--max_train_steps=4", "--max-train-steps=20", "--no_center_crop"]
    )
    assert last.max_train_steps == 20


LIKE_A_PATH = re.compile(r"dir$|file|folder|path|weights$|_lora$|_from|_list$|_config$|^model$|^data$|^lpips$|^output$")
NO_PATHS = {"output", "fuse_single_file"}
"""The activation of an autoencoder's decoder, and a switch."""


@pytest.mark.parametrize("cls", [DreamBoothSettings, Concept, VAETrainingSettings])
def test_every_setting_that_is_named_like_a_path_is_one(cls: Any) -> None:
    fields = dataclasses.fields(cls)
    named = {f.name for f in fields if any(LIKE_A_PATH.search(name) for name in (f.name, *f.metadata["aliases"]))}
    helped = {
        f.name for f in fields if re.match(r"(parent )?(folder|file|adapter file|config\.json)", f.metadata["help"])
    }
    assert (named | helped) - NO_PATHS == {f.name for f in fields if f.metadata["path"]}


def paths_of(cls: Any) -> list[str]:
    return [name for f in dataclasses.fields(cls) if f.metadata["path"] for name in (f.name, *f.metadata["aliases"])]


@pytest.mark.parametrize("name", paths_of(DreamBoothSettings))
def test_home_is_expanded_in_flags_files_and_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    aliases = {field.metadata["aliases"]: field.name for field in dataclasses.fields(DreamBoothSettings)}
    field = next((field for names, field in aliases.items() if name in names), name)
    needed = [word for word in WORDS if not word.startswith(f"--{field}=")]
    (tmp_path / "run.yaml").write_text(f"{name}: ~/x\n")
    for words in ([f"--{name}=~/x"], [f"--{name.replace('_', '-')}", "~/x"], ["--config=~/run.yaml"]):
        assert getattr(settings_from(DreamBoothSettings, needed + words), field) == str(tmp_path / "x")
    assert getattr(DreamBoothSettings(**{**NEEDED, field: "~/x"}), field) == str(tmp_path / "x")


def test_home_is_expanded_in_concepts_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\nconcepts: [{instance_data_dir: ~/a, instance_prompt: b, class_data_dir: ~/c}]")
    settings = from_yaml(DreamBoothSettings, path)
    (one,) = settings.subjects
    assert (one.instance_data_dir, one.class_data_dir) == (f"{tmp_path}/a", f"{tmp_path}/c")
    assert VAETrainingSettings(lpips=("~/a", "~/b")).lpips == (f"{tmp_path}/a", f"{tmp_path}/b")


def test_every_argument_of_mflux_vae_that_is_a_path_expands_home() -> None:
    parser = vae_cli._parser(vae_cli._registered())
    assert parser.commands is not None and len(parser.commands) > 9
    for command, its in parser.commands.items():
        if command == "train":  # from `VAETrainingSettings`
            continue
        for action in its._actions:
            names = {action.dest, *(word.lstrip("-") for word in action.option_strings)}
            text = f"{action.metavar} {action.help}"
            if any(LIKE_A_PATH.search(name) for name in names) or re.search("FILE|FOLDER|folder|image files", text):
                assert action.type is expand or action.nargs == 0, (command, action.dest)


def test_a_user_who_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingsError, match="no user 'nobody_of_this_name'"):
        expand("~nobody_of_this_name/x")
    assert expand("./~x") == "./~x" and expand("a~/x") == "a~/x"


def test_names_that_are_not_utf_8_are_paths_but_no_text() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert DreamBoothSettings(**{**NEEDED, "output_dir": name}).output_dir == name and printable(name) == "caf\\xe9"
    assert json.loads(json.dumps(name)) == name and file_name(name) == name and file_name("é⭐") == "é⭐"
    with pytest.raises(SettingsError, match="--instance_prompt"):
        DreamBoothSettings(**{**NEEDED, "instance_prompt": name})
    arrived = "ein ⭐".encode().decode("ascii", "surrogateescape")  # where the locale is C
    assert DreamBoothSettings(**{**NEEDED, "instance_prompt": arrived}).instance_prompt == "ein ⭐"


@pytest.mark.parametrize("name", ["output_dir", "class_data_dir"])
def test_an_empty_path_is_not_this_folder(name):
    with pytest.raises(SettingsError, match=f"--{name} is empty"):
        DreamBoothSettings(model="tiny", instance_data_dir="x", instance_prompt="sks", **{name: ""})
    with pytest.raises(SettingsError, match="empty"):
        expand("")


@pytest.mark.parametrize("value", ["[]", "[a folder]", "{instance_data_dir: x}"])
def test_errors_about_concepts_name_the_file(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"concepts: {value}")
    with pytest.raises(SettingsError, match=r"c\.yaml.*--concepts"):
        from_yaml(DreamBoothSettings, path)
