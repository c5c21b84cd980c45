"""Flags and YAML: every flag and key sets its field; mistakes are named."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.settings.fields import check_fields, field_type, flag, is_tuple
from mflux_vae_train.settings.flags import add_flags, from_yaml, parser_from, settings_from, settings_of, to_yaml

NEEDED = ["--model=tiny", "--instance_data_dir=pictures", "--instance_prompt=a photo of sks dog"]
FIELDS = {field.name: field for field in dataclasses.fields(DreamBoothSettings) if field.name != "concepts"}
HINTS = typing.get_type_hints(DreamBoothSettings)
WITH = {"keep_best": {"validation_share": 0.25}}
"""Settings that another one needs."""


def other_than_default(name: str) -> Any:
    """An allowed value that differs from the default."""
    one = other_single(name)
    return (one,) if is_tuple(HINTS[name]) else one


def other_single(name: str) -> Any:
    field, (kind, _) = FIELDS[name], field_type(HINTS[name])
    if choices := field.metadata["choices"]:
        return next(choice for choice in choices if choice != field.default)
    if kind is bool:
        return field.default is not True
    if kind is str:
        return f"some text for {name}"  # all different: folders must differ
    if kind is int:
        return min(16, field.metadata.get("most") or 16)
    return 0.25


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("hyphens", [False, True])
def test_every_flag_reaches_its_field(name: str, hyphens: bool) -> None:
    value = other_than_default(name)
    flag = "--" + (name.replace("_", "-") if hyphens else name)
    words = [flag] if value is True else [flag, str(value[0] if isinstance(value, tuple) else value)]
    if value is False:
        words = [flag.replace("--", "--no-" if hyphens else "--no_")]
    words += [f"--{other}={its_value}" for other, its_value in WITH.get(name, {}).items()]
    assert getattr(settings_from(DreamBoothSettings, NEEDED + words), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_every_yaml_key_reaches_its_field(name: str, tmp_path: Path) -> None:
    value = other_than_default(name)
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: {list(value) if isinstance(value, tuple) else value}\n")
    needed = [word for word in NEEDED if not word.startswith(f"--{name}=")]
    needed += [f"--{other}={its_value}" for other, its_value in WITH.get(name, {}).items()]
    settings = settings_from(DreamBoothSettings, [*needed, "--config", str(path)])
    assert getattr(settings, name) == value


def test_yaml_round_trip(tmp_path: Path) -> None:
    excluded = dict.fromkeys(("validation_epochs", "validation_data_dir", "lora_layers"), None) | dict.fromkeys(
        ("use_8bit_adam", "use_dora"), False
    )
    values = {name: other_than_default(name) for name in FIELDS} | excluded
    settings = DreamBoothSettings(
        **values | {"train_mode": "lora", "learning_rate": 5e-6, "instance_prompt": "ein Foto: «sks» # Hund"}
    )
    for one in (settings, settings_from(DreamBoothSettings, NEEDED)):
        path = tmp_path / "settings.yaml"
        path.write_text(to_yaml(one), encoding="utf-8")
        assert from_yaml(DreamBoothSettings, path) == one


def test_flags_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nlearning-rate: 1e-4\nrank: 8\n")  # YAML 1.1 reads 1e-4 as text
    settings = settings_from(DreamBoothSettings, [*NEEDED, f"--config={path}", "--seed=5", "--rank=none"])
    assert (settings.seed, settings.learning_rate, settings.rank) == (5, 1e-4, None)
    assert settings.max_train_steps == 800


def test_concepts_are_nested_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: tiny\n"
        "concepts:\n"
        "  - {instance_data_dir: cats, instance_prompt: a sks cat, repeats: 3}\n"
        "  - instance-data-dir: dogs\n"
        "    instance_prompt: a xyz dog\n"
        "    class_prompt: a dog\n"
    )
    settings = from_yaml(DreamBoothSettings, path)
    assert settings.concepts == (
        Concept(instance_data_dir="cats", instance_prompt="a sks cat", repeats=3),
        Concept(instance_data_dir="dogs", instance_prompt="a xyz dog", class_prompt="a dog"),
    )
    assert [one.repeats for one in settings.subjects] == [3, 1] and settings.instance_prompt == "a sks cat"
    words = [str({name: value for name, value in vars(one).items() if value}) for one in settings.concepts]
    assert settings_from(DreamBoothSettings, ["--model=tiny", "--concepts", *words]) == settings
    path.write_text(to_yaml(settings))
    assert from_yaml(DreamBoothSettings, path) == settings


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[{instance_data_dir: a}]", "--concepts: missing: instance_prompt"),
        ("[{instance_data_di: a}]", "instance_data_dir?"),
        ("[a dog]", "name: value"),
        ("[{instance_data_dir: a, instance_prompt: b, repeats: 0}]", "--repeats is 0"),
        ("[{instance_data_dir: a, instance_prompt: b}]\ninstance_prompt: c", "--concepts"),
        ("[{instance_data_dir: a, instance_prompt: b}]\noutput_dir: a", "folder"),
    ],
)
def test_mistakes_in_concepts_are_named(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: tiny\nconcepts: {text}\n")
    with pytest.raises(SettingsError) as caught:
        from_yaml(DreamBoothSettings, path)
    assert word in str(caught.value)


def test_a_boolean_can_be_turned_off() -> None:
    off = settings_from(DreamBoothSettings, [*NEEDED, "--no_with_prior_preservation"])
    assert off.with_prior_preservation is False
    assert settings_from(DreamBoothSettings, NEEDED).with_prior_preservation is None


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--learning_rat=1"], "--learning_rate?"),
        (["--zzz"], "--zzz"),
        (["sks"], "sks"),
        (["--rank=four"], "--rank"),
        (["--rank"], "--rank"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words: list[str], word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(DreamBoothSettings, NEEDED + words)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_required_flags_are_listed() -> None:
    with pytest.raises(SettingsError, match="--instance_data_dir, --instance_prompt"):
        settings_from(DreamBoothSettings, ["--model=tiny"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("learning_rat: 1", "learning_rate?"),
        ("- a\n- b", "list"),
        ("a: [", "YAML"),
        ("rank: four", "--rank is 'four'"),
        ("train_batch_size: 1.5", "--train_batch_size is 1.5"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings_from(DreamBoothSettings, [*NEEDED, "--config", str(path)])
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="exist"):
        from_yaml(DreamBoothSettings, tmp_path / "nowhere.yaml")


def test_help_names_every_flag_once() -> None:
    text = parser_from(DreamBoothSettings).format_help()
    for name in FIELDS:
        assert f"  --{name}" in text
    assert "--train-batch-size" not in text
    assert len(text.split("\n\n")[0].splitlines()) == 1  # the usage; each flag is explained below
    assert "--old" in parser_from(Texts, ignored_flags={"old": "there is nothing old"}).format_help()


def test_config_and_flags_import_neither_transformers_nor_numpy_nor_yaml() -> None:
    code = (
        "import sys; before = set(sys.modules); import mflux_vae.errors; package = set(sys.modules) - before\n"
        "import mflux_vae_train.dreambooth.config, mflux_vae_train.settings.flags\n"
        "new = set(sys.modules) - before - package\n"
        "sys.exit(', '.join(sorted({'mlx.nn', 'numpy', 'transformers', 'yaml'} & new)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """Several values, aliases and presets, which `DreamBoothSettings` has not."""

    widths: tuple[int, ...] = flag("widths", (1, 2), least=1)
    rate: float = flag("rate", 0.5, aliases=("lr",))

    def __post_init__(self) -> None:
        check_fields(self)


PRESETS = {"wide": {"widths": (64,), "rate": 0.25}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Any number of texts."""

    prompts: tuple[str, ...] | None = flag("prompts", None, group="texts")

    def __post_init__(self) -> None:
        check_fields(self)


def test_texts_are_collected_and_never_split(tmp_path: Path) -> None:
    assert settings_from(Texts, []).prompts is None
    for words in (["--prompts", "a dog, wet", "a cat"], ["--prompts", "a dog, wet", "--prompts=a cat"]):
        assert settings_from(Texts, words).prompts == ("a dog, wet", "a cat")
    path = tmp_path / "run.yaml"
    for text, expected in (("prompts: a dog, wet", ("a dog, wet",)), ("prompts: [a, b c]", ("a", "b c"))):
        path.write_text(text)
        assert from_yaml(Texts, path) == Texts(prompts=expected)
    path.write_text(to_yaml(Texts(prompts=("x", "y"))))
    assert from_yaml(Texts, path).prompts == ("x", "y")
    assert "texts:" in parser_from(Texts).format_help()


@pytest.mark.parametrize("words", [["--old"], ["--old", "3"], ["--old=x"], ["--config", "run.yaml"]])
def test_an_ignored_flag_is_logged(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("old: 3\nprompts: a\n")
    settings = settings_from(Texts, [*words, "--prompts=a"], ignored_flags={"old": "there is nothing old"})
    assert settings == Texts(prompts=("a",))
    (record,) = caplog.records
    assert "--old" in record.getMessage()
    with pytest.raises(SettingsError, match="old"):
        settings_from(Texts, words)


def small(*words: str) -> Small:
    parser = argparse.ArgumentParser()
    add_flags(parser, Small, PRESETS)
    return settings_of(Small, vars(parser.parse_args(words)), PRESETS)


def test_several_values_and_other_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert small() == Small() and small("--widths", "3", "4", "--lr", "2").widths == (3, 4)
    assert small("--lr", "2").rate == 2.0
    for text in ("widths: [3, 4]\nlr: 2\n", "widths: 3 4\nrate: 2.0\n", to_yaml(Small(widths=(3, 4), rate=2.0))):
        path.write_text(text)
        assert from_yaml(Small, path) == Small(widths=(3, 4), rate=2.0)
    for words in (["--widths", "0"], ["--widths", "a"]):
        with pytest.raises(SettingsError, match="--widths is"):
            small(*words)
    with pytest.raises(SettingsError, match="--widths is"):
        Small(widths=())


def test_the_file_and_flags_override_presets(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: wide\nrate: 3\n")
    assert small("--preset", "wide") == Small(widths=(64,), rate=0.25)
    assert small("--preset", "wide", "--lr", "1") == Small(widths=(64,), rate=1.0)
    assert small("--config", str(path)) == Small(widths=(64,), rate=3.0)
    with pytest.raises(SettingsError, match="wide"):
        small("--preset", "narrow")


def test_a_boolean_may_be_followed_by_its_value() -> None:
    """As in the commands of diffusers' documentation."""
    for words, value in ((["--prodigy_decouple=False"], False), (["--prodigy_decouple", "True"], True)):
        assert settings_from(DreamBoothSettings, [*words, *NEEDED]).prodigy_decouple is value
    with pytest.raises(SettingsError, match="--prodigy_decouple"):
        settings_from(DreamBoothSettings, ["--prodigy_decouple=maybe", *NEEDED])
