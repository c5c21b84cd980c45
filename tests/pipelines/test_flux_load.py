"""Published models by name: from the hub's cache, with a clear error where they cannot be had."""

from __future__ import annotations

import huggingface_hub
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.pipelines import flux1


def test_a_published_name_asks_the_hub_for_its_repository(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repository, **_):
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match=r"model_index\.json"):  # the snapshot of this test is empty
        flux1.load("schnell")
    assert asked == ["black-forest-labs/FLUX.1-schnell"]


def test_what_cannot_be_downloaded_is_one_clear_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("401 Client Error\nmore about it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SettingsError, match=r"FLUX\.1-dev .*401 Client Error\); .*folder") as caught:
        flux1.load("dev")
    assert "\n" not in str(caught.value)


def test_a_folder_is_opened_as_it_is(tmp_path):
    with pytest.raises(WeightsError, match=str(tmp_path)):
        flux1.load(str(tmp_path))
