"""Two paths lead to one place through links, and on volumes that ignore case."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mflux_vae.cli import commands
from mflux_vae.utils.paths import same_place


def test_links_and_detours_lead_to_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert same_place(folder, link) and same_place("a", folder) and same_place("b/../a/.", link)
    assert same_place(folder / "new" / "x", link / "new" / "x")
    assert not same_place(folder, tmp_path)
    assert not same_place(folder, folder / "new")
    assert not same_place(folder / "new", tmp_path / "new")


def test_volumes_that_ignore_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower, samefile = tmp_path / "Photos", tmp_path / "photos", os.path.samefile
    upper.mkdir()
    lower.mkdir()  # a volume that heeds case has two folders; the one below takes them for one
    assert not same_place(upper, lower)
    monkeypatch.setattr(os.path, "samefile", lambda *both: samefile(*(str(one).lower() for one in both)))
    assert same_place(upper, lower)
    assert not same_place(tmp_path / "Class", tmp_path / "class")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert same_place(tmp_path / "Class" / "Caf\u00e9", tmp_path / "class" / "Cafe\u0301")
    assert not same_place(tmp_path / "Class", tmp_path / "classes")
    targets = commands._output_files(["IMG.jpg", "img.png", "other.png"], str(tmp_path / "out"))
    assert [file.name for file in targets.values()] == ["IMG.jpg.png", "img.png.png", "other.png"]
