"""What comes to a console: each thing once, and nothing that a bar shows already."""

from __future__ import annotations

import logging

import pytest

from mflux_vae_train.monitoring.console import logging_to_console


def test_lines_and_warnings_and_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    component, training = logging.getLogger("mflux_vae"), logging.getLogger("mflux_vae_train.monitoring.progress")
    with logging_to_console(("mflux_vae", "mflux_vae_train")):
        for path in ("vae", "vae", "other"):
            component.info("%s opened", path)
        for _ in range(2):
            training.info("update 5")
            component.warning("odd")
        training.info("update 6", extra={"on_bar": True})
    component.info("later")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["vae opened", "other opened", "update 5", "update 5"]
    assert err.splitlines() == ["warning: odd"] * 2
