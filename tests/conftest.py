"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

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
