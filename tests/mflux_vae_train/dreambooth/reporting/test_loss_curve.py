from __future__ import annotations

import math

import pytest

from mflux_vae.images import load_image
from mflux_vae_train.dreambooth.reporting.loss_curve import write_loss_curve


def test_loss_curve_is_drawn(tmp_path):
    records = [{"update": update, "instance_loss": 1 / update} for update in range(1, 50)]
    write_loss_curve(records, tmp_path / "loss.png")
    assert load_image(tmp_path / "loss.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan]])
def test_loss_curve_of_zero_or_one_update(losses, tmp_path):
    records = [{"update": 1, "prior_loss": loss} for loss in losses]
    write_loss_curve(records, tmp_path / "loss.png")
    assert load_image(tmp_path / "loss.png").ndim == 3
