"""settings.yaml keeps what was given and what was derived apart: read again it is the same run, and a change derives
the rest anew. Of two settings for one quantity the flag replaces the file's."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from mflux_vae.errors import SettingsError
from mflux_vae.utils.yaml_io import read_yaml
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.run_folder import RESUMABLE_CHANGES
from mflux_vae_train.fingerprint import settings_identity
from mflux_vae_train.settings.fields import field_type, is_tuple
from mflux_vae_train.settings.flags import from_yaml, settings_from, to_yaml
from mflux_vae_train.settings.origins import origins_of, unused_of
from tests.mflux_vae_train.dreambooth.planning.test_resolve import resolved_from

NEEDED = {"model": "fake", "instance_data_dir": "pictures", "instance_prompt": "a photo of sks dog"}
OF_ONE_CALL = ("resume_from_checkpoint", "allow_changes", "dry_run")
HINTS = typing.get_type_hints(DreamBoothSettings)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
PATHS = st.text(st.sampled_from("abé ⭐:#'\"-0\udce9"), min_size=1, max_size=8).map("p{}".format)


def values_of(field: Any) -> st.SearchStrategy[Any]:
    kind, optional = field_type(HINTS[field.name])
    limits = field.metadata
    one: st.SearchStrategy[Any]
    if limits["choices"]:
        one = st.sampled_from(limits["choices"])
    elif kind is bool:
        one = st.booleans()
    elif kind is int:
        one = st.integers(int(limits["least"] or 0), 40)
    elif kind is float:
        one = st.floats(1e-6, 0.9)
    else:
        one = PATHS if limits["path"] else TEXTS
    one = st.lists(one, min_size=1, max_size=3).map(tuple) if is_tuple(HINTS[field.name]) else one
    return st.none() | one if optional else one


DRAWN = {
    field.name: values_of(field)
    for field in dataclasses.fields(DreamBoothSettings)
    if field.name not in {*OF_ONE_CALL, "concepts", "report_to", "lora_weights", "resolution", "quantize"}
}


def run_of(chosen: DreamBoothSettings) -> ResolvedSettings:
    return resolved_from(chosen)


def identity(run: ResolvedSettings) -> dict[str, Any]:
    return settings_identity(run.to_settings(), RESUMABLE_CHANGES)


@given(st.fixed_dictionaries({}, optional=DRAWN))
@settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_settings_written_and_read_are_the_same_run(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    try:
        chosen = DreamBoothSettings(**NEEDED | values)
        run = run_of(chosen)
    except SettingsError:
        assume(False)
    path.write_text(to_yaml(run.to_settings(), chosen, omit=OF_ONE_CALL), encoding="utf-8", errors="surrogatepass")
    again = settings_from(DreamBoothSettings, [f"--config={path}"])
    assert again == chosen or chosen.num_train_epochs is not None  # then --max_train_steps has no effect
    assert identity(run_of(again)) == identity(run) and run_of(again).to_settings() == run.to_settings()
    assert from_yaml(DreamBoothSettings, path) == run.to_settings()
    path.write_text(to_yaml(run.to_settings()), encoding="utf-8")  # as all settings.yaml were before
    assert identity(run_of(settings_from(DreamBoothSettings, [f"--config={path}"]))) == identity(run)


def written(tmp_path: Path, **values: Any) -> Path:
    chosen = DreamBoothSettings(**NEEDED | values)
    (tmp_path / "settings.yaml").write_text(to_yaml(run_of(chosen).to_settings(), chosen, omit=OF_ONE_CALL))
    return tmp_path / "settings.yaml"


def test_derived_values_are_derived_anew_when_one_is_changed(tmp_path: Path) -> None:
    path = written(tmp_path, rank=16)
    content = read_yaml(path)
    assert content.keys() == {*NEEDED, "rank", "derived"} and content["derived"]["lora_alpha"] == 16
    flags = ["--rank=4", "--optimizer=lion", "--instance_prompt=a photo of xyz star", "--max_train_steps=80"]
    run = run_of(settings_from(DreamBoothSettings, [f"--config={path}", *flags]))
    fresh = run_of(DreamBoothSettings(**NEEDED | {"instance_prompt": "a photo of xyz star"}, rank=4, optimizer="lion"))
    assert run.lora_alpha == 4 and run.validation_prompt == ("a photo of xyz star",) and run.validation_steps == 10
    assert run.learning_rate == fresh.learning_rate and run.class_prompt == "a photo of a star"
    full = settings_from(DreamBoothSettings, [f"--config={written(tmp_path)}", "--train_mode=full"])
    assert run_of(full).rank is None


@pytest.mark.parametrize(
    ("text", "flag", "kept", "dropped"),
    [
        ("num_train_epochs: 2", "--max_train_steps=7", ("max_train_steps", 7), ("num_train_epochs", None)),
        ("max_train_steps: 7", "--num_train_epochs=2", ("num_train_epochs", 2), ("max_train_steps", 800)),
        ("validation_epochs: 2", "--validation_steps=7", ("validation_steps", 7), ("validation_epochs", None)),
        ("with_prior_preservation: true", "--prior_preservation=none", ("prior_preservation", "none"), None),
        ("prior_preservation: dop", "--with_prior_preservation", ("with_prior_preservation", True), None),
        ("prior_preservation: dop", "--no_with_prior_preservation", ("prior_preservation", None), None),
        ("use_8bit_adam: true", "--optimizer=lion", ("optimizer", "lion"), ("use_8bit_adam", False)),
        ("optimizer: prodigy", "--use_8bit_adam", ("optimizer", "adamw8bit"), None),
        ("rank: 8\nlora_alpha: 4", "--lora_weights=a.safetensors", ("rank", None), ("lora_alpha", None)),
        ("concepts: [{instance_data_dir: a, instance_prompt: b}]", None, ("instance_data_dir", "pictures"), None),
    ],
)
def test_a_flag_replaces_the_files_setting_for_the_same_quantity(
    text: str, flag: str | None, kept: Any, dropped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: fake\n{text}\n")
    needed = [f"--{name}={value}" for name, value in NEEDED.items()]
    found = settings_from(DreamBoothSettings, [*needed, f"--config={tmp_path / 'run.yaml'}", *([flag] if flag else [])])
    for name, value in filter(None, (kept, dropped)):
        assert getattr(found, name) == value
    assert "run.yaml, line 2" in caplog.text and caplog.text.count("not used") == 1
    assert origins_of(found)["model"] == "--model"


@pytest.mark.parametrize("in_file", [False, True])
def test_two_settings_for_one_quantity_are_refused(in_file: bool, tmp_path: Path) -> None:
    values = {"num_train_epochs": 2, "max_train_steps": 800}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    flags = [f"--{name}={value}" for name, value in (NEEDED | ({} if in_file else values)).items()]
    with pytest.raises(SettingsError, match=r"--num_train_epochs.*--max_train_steps"):
        settings_from(DreamBoothSettings, [*flags, *([f"--config={tmp_path / 'run.yaml'}"] if in_file else [])])
    run = run_of(DreamBoothSettings(**NEEDED, num_train_epochs=2, max_train_steps=7))
    assert any(line.startswith("--max_train_steps has no effect") for line in run.warnings)


def test_an_older_file_with_all_settings_can_be_changed_by_either_name(tmp_path: Path) -> None:
    run = run_of(DreamBoothSettings(**NEEDED, num_train_epochs=8))
    path = tmp_path / "old.yaml"
    path.write_text(to_yaml(run.to_settings()))
    for flags, updates in (([], 10), (["--max_train_steps=7"], 7), (["--num_train_epochs=4"], 5)):
        assert run_of(settings_from(DreamBoothSettings, [f"--config={path}", *flags])).plan.updates == updates
    off = settings_from(DreamBoothSettings, [f"--config={path}", "--prior_preservation=dop"])
    assert run_of(off).prior_preservation == "dop"


def test_errors_about_two_settings_say_where_the_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("\nrank: 4\n")
    flags = [f"--{name}={value}" for name, value in NEEDED.items()]
    with pytest.raises(SettingsError, match=r"--train_mode.*run\.yaml, line 2"):
        settings_from(DreamBoothSettings, [*flags, f"--config={tmp_path / 'run.yaml'}", "--train_mode=full"])


def test_concepts_are_the_same_run(tmp_path: Path) -> None:
    concepts = (Concept(instance_data_dir="a", instance_prompt="a photo of sks dog"),)
    chosen = DreamBoothSettings(model="fake", concepts=concepts)
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(run_of(chosen).to_settings(), chosen))
    again = settings_from(DreamBoothSettings, [f"--config={path}"])
    assert again == chosen and identity(run_of(again)) == identity(run_of(chosen))


def test_each_setting_knows_who_gave_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: fake\nseed: 5\nold: 3\nmax_train_steps: 80\n")
    flags = [f"--config={tmp_path / 'run.yaml'}", "--num_train_epochs=2", "--instance-prompt=a photo of sks dog"]
    ignored = {"old": "there is nothing old"}
    chosen = settings_from(DreamBoothSettings, [*flags, "--instance_data_dir=pictures"], ignored_flags=ignored)
    run = run_of(chosen)
    names = ("model", "seed", "instance_prompt", "rank", "lora_alpha", "max_train_steps", "repeats")
    assert [run.origin(name).removeprefix(f"{tmp_path}/") for name in names] == [
        *("run.yaml, line 1", "run.yaml, line 2", "--instance_prompt", "the pipeline", "derived", "derived", "default")
    ]
    assert run_of(DreamBoothSettings(**NEEDED, seed=5)).origin("seed") == "given"
    assert [line.split()[0] for line in unused_of(chosen)] == ["--old", "not"]
