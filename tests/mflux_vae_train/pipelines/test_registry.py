from __future__ import annotations

import json
import sys
import types
from importlib.metadata import EntryPoint

import pytest

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae_train.pipelines import registry
from tests.contracts.fake import FakePipeline


class Entry:
    """An entry point with a distribution, as an installed one has."""

    def __init__(self, name: str, value: str, distribution: str) -> None:
        self.name, self.value = name, value
        self.dist = types.SimpleNamespace(name=distribution)

    def load(self):
        return EntryPoint(self.name, self.value, registry.GROUP).load()


@pytest.fixture
def install(monkeypatch):
    """Registers entry points given as (name, value, distribution)."""

    def registered(*entries: tuple[str, str, str]) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda *, group: [Entry(*entry) for entry in entries])

    opened: list[str] = []

    def loader(name: str):
        def load(model: str) -> FakePipeline:
            opened.append(f"{name}({model})")
            return FakePipeline()

        return load

    module = types.ModuleType("plug")
    module.first, module.second = loader("first"), loader("second")
    module.not_callable = 7
    module.no_pipeline = lambda model: object()
    monkeypatch.setitem(sys.modules, "plug", module)
    registered.opened = opened
    return registered


def test_name_is_passed_to_its_loader(install):
    install(("mine", "plug:first", "mine-dist"))
    assert isinstance(registry.open_pipeline("mine"), FakePipeline)
    assert install.opened == ["first(mine)"]


def test_listing_names_imports_nothing(install):
    install(("b", "missing_module:x", "d"), ("a", "plug:first", "d"), ("FluxPipeline", "plug:first", "d"))
    assert registry.available() == ["a", "b"]
    assert install.opened == []


def test_unknown_name_lists_working_and_similar_names(install):
    install(("tiny", "plug:first", "d"), ("broken", "missing_module:x", "d"))
    with (
        pytest.warns(UserWarning, match="broken"),
        pytest.raises(SettingsError) as error,
    ):
        registry.open_pipeline("tinny")
    assert str(error.value) == "there is no pipeline or folder 'tinny'; did you mean tiny? (pipelines: tiny)"


def test_error_without_installed_pipelines(install):
    install()
    with pytest.raises(SettingsError, match="none installed"):
        registry.open_pipeline("tiny")


@pytest.mark.parametrize("value", ["missing_module:load", "plug:missing", "plug:not_callable"])
def test_broken_entry_point_is_named_with_the_reason(install, value):
    install(("mine", value, "their-dist"))
    with pytest.warns(UserWarning, match="broken"), pytest.raises(PluginError, match="their-dist"):
        registry.open_pipeline("mine")


def test_broken_entry_point_does_not_affect_others(install, recwarn):
    install(("broken", "missing_module:load", "d"), ("mine", "plug:first", "d"))
    assert isinstance(registry.open_pipeline("mine"), FakePipeline)
    assert not recwarn


def test_incomplete_pipeline_raises_with_missing_members(install):
    install(("mine", "plug:no_pipeline", "their-dist"))
    with pytest.raises(PluginError, match=r"lacks .*denoiser.*encode_images"):
        registry.open_pipeline("mine")


def test_duplicate_name_warns_and_order_is_stable(install):
    entries = [("mine", "plug:second", "zebra"), ("mine", "plug:first", "aardvark")]
    for order in (entries, entries[::-1]):
        install(*order)
        with pytest.warns(UserWarning, match=r"aardvark \(plug:first\), zebra \(plug:second\)"):
            registry.open_pipeline("mine")
    assert install.opened == ["first(mine)", "first(mine)"]


def test_own_names_take_precedence(install, monkeypatch):
    own = types.ModuleType("mflux_vae_train.own")
    own.load = lambda model: FakePipeline()
    monkeypatch.setitem(sys.modules, "mflux_vae_train.own", own)
    install(("tiny", "plug:first", "aardvark"), ("tiny", "mflux_vae_train.own:load", "mflux-vae"))
    with pytest.warns(UserWarning, match=r"mflux-vae .*, aardvark"):
        registry.open_pipeline("tiny")
    assert install.opened == []


def test_second_entry_point_is_used_if_the_first_is_broken(install):
    install(("mine", "missing_module:x", "a"), ("mine", "plug:second", "b"))
    with pytest.warns(UserWarning, match="more than once"), pytest.warns(UserWarning, match="skipped"):
        registry.open_pipeline("mine")
    assert install.opened == ["second(mine)"]


def test_distribution_listed_twice_does_not_warn(install, recwarn):
    install(("mine", "plug:first", "d"), ("mine", "plug:first", "d"))
    registry.open_pipeline("mine")
    assert not recwarn


def test_folder_is_opened_by_its_class(install, tmp_path):
    install(("FluxPipeline", "plug:first", "d"), ("tiny", "plug:second", "d"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    registry.open_pipeline(str(tmp_path))
    assert install.opened == [f"first({tmp_path})"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no model_index.json"),
        ("{", "does not name a _class_name"),
        ("[]", "does not name a _class_name"),
        (
            '{"_class_name": "OtherPipeline"}',
            r"OtherPipeline, which nothing installed opens \(known: FluxPipeline\)",
        ),
    ],
)
def test_unopenable_folder_error(install, tmp_path, index, message):
    install(("FluxPipeline", "plug:first", "d"))
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(SettingsError, match=message):
        registry.open_pipeline(str(tmp_path))


def test_the_output_folder_of_a_run_is_named(install, tmp_path):
    install(("FluxPipeline", "plug:first", "d"))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SettingsError, match="--lora_weights"):
        registry.open_pipeline(str(tmp_path))
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "model_index.json").write_text("{}")
    with pytest.raises(SettingsError, match="fused"):
        registry.open_pipeline(str(tmp_path))


def test_repositories_with_known_configurations_open_without_the_hub(install, monkeypatch):
    module = types.ModuleType("plug_hub")
    module.load = lambda model, revision=None: FakePipeline()
    module.knows = lambda repository: repository == "owner/known"
    module.load.__module__ = "plug_hub"
    monkeypatch.setitem(sys.modules, "plug_hub", module)
    install(("MinePipeline", "plug_hub:load", "d"))
    monkeypatch.setattr(registry.hub, "download", lambda *_: pytest.fail("the hub was asked"))
    for name in ("owner/known", "owner/known/", "https://huggingface.co/owner/known"):
        assert isinstance(registry.open_pipeline(name), FakePipeline)
    with pytest.raises(pytest.fail.Exception):
        registry.open_pipeline("owner/known", revision="main")


def test_an_absolute_path_is_not_a_repository():
    with pytest.raises(SettingsError, match="/nowhere/model"):
        registry.open_pipeline("/nowhere/model")
