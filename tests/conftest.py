"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import huggingface_hub.constants
import pytest

from mflux_vae import cli

Run: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``mflux-vae`` in this process: arguments -> exit status, standard output, standard error."""

    def main(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return main


@pytest.fixture
def hub_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client keeps all that it keeps in this folder: files, tokens, what it notes of the hub."""
    constants, home = huggingface_hub.constants, tmp_path_factory.mktemp("hub")
    usual = constants.HF_HOME
    for name, value in vars(constants).items():
        if isinstance(value, str) and value.startswith(usual):
            monkeypatch.setattr(constants, name, str(home) + value.removeprefix(usual))
    return home
