"""diffusers' and latent-diffusion's configurations, as they stand, and those that fit nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mflux_vae import SettingsError, WeightsError
from mflux_vae.pretrained import loading
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.weights.formats.files import write_safetensors
from tests.mflux_vae.naming_samples import kl, named, parameters, same
from tests.mflux_vae.small_models import small_plain

DDCONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "in_channels": 3,
    "resolution": 32,
    "double_z": True,
    "z_channels": 4,
}
YAML = """
model:
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    embed_dim: 4
    monitor: val/rec_loss
    ddconfig:
      double_z: True
      z_channels: 4
      resolution: 32
      in_channels: 3
      out_ch: 3
      ch: 32
      ch_mult: [1, 2]
      num_res_blocks: 1
      attn_resolutions: [16]
"""


def test_latent_diffusions_configurations_are_accepted_as_they_stand(tmp_path: Path) -> None:
    network = kl(encoder_attention=(1,), decoder_attention=(1,), scaling_factor=1.0, sample_size=32)
    write_safetensors(tmp_path / "a.safetensors", named(network, "compvis"))
    (tmp_path / "a.yaml").write_text(YAML)
    for config in (DDCONFIG, {"ddconfig": DDCONFIG, "embed_dim": 4}, tmp_path / "a.yaml", str(tmp_path / "a.yaml")):
        opened = loading.open_network(tmp_path / "a.safetensors", config=config)
        assert opened.config == network.config and same(parameters(opened), parameters(network))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("nothing", "no such file or preset"),
        ("a.json", r"a\.json: not valid JSON"),
        ("a.yaml", r"not valid YAML"),
        ("b.yaml", r"b\.yaml: not a mapping"),
        ({"ch": 32}, "ddconfig: .* missing"),
        ({"_class_name": "VQModel"}, "VQModel"),
        ({**kl().config.to_dict(), "block_out_channels": [32, 96]}, "misshapen: .*is .*expected"),
        (small_plain().config.to_dict(), "missing: .*unknown: "),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config: Any, told: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", named(kl()))
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_text("- 1")
    config = str(tmp_path / config) if isinstance(config, str) and "." in config else config
    with pytest.raises((SettingsError, WeightsError), match=told) as caught:
        loading.open_network(tmp_path / "a.safetensors", config=config)
    assert "\n" not in str(caught.value)


ODD = (None, 0, -1, 1.5, 2**40, "", "x", [], {}, [0], [-8], ["a"], [1.5], [2**40], True, float("nan"), 1e300, [[1]])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_configuration_ends_in_a_traceback(name: str) -> None:
    family, refused = FAMILIES[name], 0
    usual = family.config().to_dict()
    for key in usual:
        for value in ODD:
            try:
                family.build({**usual, key: value})
            except SettingsError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50
