"""Training an autoencoder: its output, exact resuming, warnings and errors."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.images import load_image
from mflux_vae.metrics.lpips import LPIPS, TABLE
from mflux_vae.pretrained import loading
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae.weights.keymaps.rules import from_mlx
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.training import step
from mflux_vae_train.vae.build import build, latent_shape, parameter_count, penultimate_features
from mflux_vae_train.vae.config import (
    PRESETS,
    VAETrainingSettings,
    get_beta_vae_config,
    get_default_config,
    preset,
    settings_from_dict,
)
from mflux_vae_train.vae.config_warnings import config_warnings
from mflux_vae_train.vae.losses.adversarial import PatchDiscriminator
from mflux_vae_train.vae.network.gradient_checkpointing import recompute_blocks
from mflux_vae_train.vae.train import VAETrainer

SMALL: dict[str, Any] = {
    "image_size": 12,
    "hidden_dims": (4, 6),
    "latent_dim": 3,
    "digits_count": 30,
    "val_share": 0.2,
    "batch_size": 8,
    "num_epochs": 3,
    "samples_every": None,
}
SPATIAL: dict[str, Any] = {**SMALL, "network": "kl", "hidden_dims": (8, 8), "layers_per_block": 1}
ADVERSARIAL: dict[str, Any] = {
    **SPATIAL,
    "image_size": 24,
    "digits_count": 8,
    "val_share": 0.25,
    "batch_size": 2,
    "disc_start": 4,
}
RICH: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "batch_size": 4,
    "ema_decay": 0.9,
    "loss_type": "beta_vae",
    "beta_steps": 5,
    "lr_scheduler": "exponential",
    "lr_warmup_steps": 2,
    "augment_flip": True,
    "augment_shift": 1,
}


def trained(tmp_path: Path, **changes: Any) -> Any:
    settings = settings_from_dict({**SMALL, "output_dir": str(tmp_path), **changes})
    return VAETrainer(settings).train()


def last_state(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(checkpoint.latest(folder) / checkpoint.ARRAYS))  # type: ignore[operator]
    return {name: np.array(array) for name, array in arrays.items()}


def lines(file: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        RICH,
        {"loss_type": "tc", "lr_scheduler": "step", "optimizer": "muon"},
        {**ADVERSARIAL, "ema_decay": 0.9},
        {"loss_type": "beta_vae", "beta_cyclical": True, "beta_steps": 4, "free_bits": 0.1},
    ],
)
def test_resumed_equals_uninterrupted_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("mflux_vae_train.vae.build.PatchDiscriminator", partial(PatchDiscriminator, width=4))
    whole = trained(tmp_path / "whole", **changes)
    assert whole.updates == 9

    calls, original = [], step.Step.__call__

    def fail(self: Any, update: int, batches: Any, rate: float) -> Any:
        calls.append(update)
        if update == 5:
            raise RuntimeError("power failure")
        return original(self, update, batches, rate)

    monkeypatch.setattr(step.Step, "__call__", fail)
    with pytest.raises(RuntimeError, match="power"):
        trained(tmp_path / "parts", **changes)
    monkeypatch.setattr(step.Step, "__call__", original)
    parts = trained(tmp_path / "parts", **changes)
    assert parts.updates == 6  # resumed from the checkpoint of the first epoch

    one, other = last_state(whole.folder), last_state(parts.folder)
    assert one.keys() == other.keys()
    assert {name.split("/")[0] for name in one} >= {"network", "optimizer"}
    assert any(name.startswith("ema/") for name in one) == ("ema_decay" in changes)
    assert any(name.startswith("discriminator optimizer/") for name in one) == ("disc_start" in changes)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(whole.folder / name) == lines(parts.folder / name)
    assert whole.best.read_bytes() == parts.best.read_bytes() and whole.last.read_bytes() == parts.last.read_bytes()
    assert trained(tmp_path / "parts", **changes).updates == 0


def test_output_of_a_run(tmp_path: Path) -> None:
    result = trained(tmp_path, experiment_name="mine", ema_decay=0.5, samples_every=2)
    assert (
        result.folder == tmp_path / "checkpoints" / "mine" and result.best == result.folder / "best_model.safetensors"
    )
    rows = lines(result.folder / "validation.jsonl")
    assert [row["update"] for row in rows] == [3, 6, 9]
    assert rows[-1].keys() == {"update", "seconds", "loss", "rec", "kl", "psnr", "tc", "active"}
    assert len(lines(result.folder / "metrics.jsonl")) == 9
    again = settings_from_dict({**SMALL, "output_dir": str(tmp_path), "experiment_name": "mine", "ema_decay": 0.5})
    assert f"latent_dim: {again.latent_dim}\n" in (result.folder / "settings.yaml").read_text()

    # both files can be opened and contain the averages
    state = last_state(result.folder)
    network: Any = loading.open_network(result.last)
    for name, value in tree_flatten(network.trainable_parameters()):
        np.testing.assert_array_equal(value, state[f"ema/average/{name.replace('.', '/')}"])
        assert not np.array_equal(value, state[f"network/{name.replace('.', '/')}"]) or value.size < 4
    assert network.encode(mx.zeros((1, 12, 12, 1))).mean.shape == (1, 3)

    samples = sorted(path.name for path in (result.folder / "samples").iterdir())
    assert samples == [f"{kind}-{n:06}.png" for kind in ("reconstructions", "samples") for n in (6, 9)]
    assert load_image(result.folder / "samples" / "samples-000009.png").shape[:2] == (8 * 12 + 7 * 2,) * 2


def test_more_epochs_resume_and_other_settings_are_rejected(tmp_path: Path) -> None:
    trained(tmp_path, experiment_name="mine")
    assert trained(tmp_path, experiment_name="mine", num_epochs=4).updates == 3
    with pytest.raises(SettingsError, match="learning_rate"):
        trained(tmp_path, experiment_name="mine", learning_rate=0.1)


@pytest.mark.parametrize("save_every", [1, 3])
def test_best_weights_and_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int) -> None:
    from mflux_vae_train.vae.evaluation.validation import Validation

    losses = iter([3.0, 1.0, 2.0, 2.0])
    original = Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda self: {**original(self), "loss": next(losses)})
    early: dict[str, Any] = {"num_epochs": 9, "early_stopping": 2, "save_every": save_every}
    result = trained(tmp_path, **early)
    assert [row["loss"] for row in lines(result.folder / "validation.jsonl")] == [3.0, 1.0, 2.0, 2.0]
    assert result.updates == 12 and len(lines(result.folder / "metrics.jsonl")) == 12
    # it ends like a run of that many epochs
    assert (result.folder / "checkpoint-12").is_dir() and (result.folder / "samples/samples-000012.png").is_file()
    assert trained(tmp_path, **early).updates == 0  # still stopped
    best, last = loading.open_network(result.best), loading.open_network(result.last)
    assert any(
        not np.array_equal(a, b)
        for (_, a), (_, b) in zip(tree_flatten(best.parameters()), tree_flatten(last.parameters()), strict=True)
    )


def test_collapse_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, beta=1e4, learning_rate=0.03, num_epochs=20, batch_norm=False)
    assert sum("collapse" in record.message for record in caplog.records) == 1


def test_collapse_is_not_reported_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, beta=1e4, learning_rate=0.03, num_epochs=5, batch_norm=False)
    assert "collapse" not in caplog.text


def test_a_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="learning_rate"):
        trained(tmp_path, learning_rate=1e30, batch_norm=False, output="linear", max_grad_norm=None)


def test_settings_that_will_collapse_are_warned_about() -> None:
    (line,) = config_warnings(preset("mnist", reduction="mean", beta=0.5))
    assert "collapse" in line
    assert not any(config_warnings(preset(name)) for name in PRESETS)


def test_a_network_from_elsewhere_leaves_the_flags_of_one_without_effect() -> None:
    for given in ({"init_from": "sd1"}, {"network_config": "a.json"}):
        (line,) = config_warnings(preset("kl-f8", **given))
        assert ("--hidden_dims, --latent_dim" in line and "a.json" in line) or "sd1" in line
        assert not config_warnings(VAETrainingSettings(**given))


@pytest.mark.parametrize(
    ("name", "other", "chosen_by"),
    [
        ("free_bits", 0.5, {"loss_type": "vae"}),
        ("beta", 4.0, {"loss_type": "tc"}),
        ("beta_end", 4.0, {"loss_type": "beta_vae"}),
        ("gamma", 2.0, {"loss_type": "tc"}),
        ("lr_gamma", 0.5, {"lr_scheduler": "step"}),
        ("lr_step_epochs", 3, {"lr_scheduler": "step"}),
        ("batch_norm", False, {"network": "flat"}),
        ("layers_per_block", 1, {"network": "kl"}),
        ("lpips_weight", 0.5, {"lpips": ("vgg.pth",)}),
        ("disc_weight", 0.8, {"disc_start": 5}),
    ],
)
def test_ignored_settings_are_warned_about(name: str, other: Any, chosen_by: dict[str, Any]) -> None:
    without = {"loss_type": "beta_vae" if name in ("free_bits", "beta") else "vae", "network": "plain"}
    if name == "free_bits":
        without["loss_type"] = "tc"
    (line,) = config_warnings(VAETrainingSettings(**{**without, name: other}))
    assert line.startswith(f"--{name} ")
    assert not config_warnings(VAETrainingSettings(**{name: other}, **chosen_by))


@pytest.mark.parametrize(("name", "parameters"), [("mlx-mnist", 149_265), ("vanilla-256", 62_980_803)])
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with mx.stream(mx.cpu):
        assert parameter_count(build(preset(name))) == parameters


def test_dictionaries_of_settings() -> None:
    config = get_default_config()
    config["experiment_name"], config["num_epochs"] = "my_vae", 100
    assert VAETrainer({**config, **SMALL}).folder == Path("checkpoints/my_vae")
    assert settings_from_dict(get_default_config()) == VAETrainingSettings() == preset("mnist")
    assert settings_from_dict(get_beta_vae_config()).beta_end == 4.0
    assert settings_from_dict({"lr": 0.5, "epochs": 2}) == VAETrainingSettings(learning_rate=0.5, num_epochs=2)
    with pytest.raises(SettingsError, match="lrr"):
        settings_from_dict({"lrr": 1})
    assert VAETrainingSettings(max_filters=64, latent_dim=8).widths == (16, 32, 64)
    assert (
        VAETrainingSettings(data="x/mnist.npz", max_filters=64, latent_dim=8).name == "vae_mnist_filters_0064_dims_0008"
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"disc_start": 3}, "vector latents"),
        ({**SPATIAL, "disc_start": 3}, "24"),
        ({"network": "plain", "image_size": 13}, "multiple"),
        ({"in_channels": 2}, "in_channels"),
        ({"mixed_precision": True, "cpu": True}, "CPU"),
        ({"data": "nowhere"}, "nowhere"),
        ({"max_filters": 6}, "multiple"),
        ({"loss_type": "tc", "batch_size": 25}, "24"),
    ],
)
def test_invalid_settings_are_errors(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(Exception, match=key):
        trained(tmp_path, **changes)
    assert not (tmp_path / "checkpoints").exists()


def test_dry_run_logs_the_plan_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = trained(tmp_path, dry_run=True)
    assert result.updates == 0 and result.metrics["loss"] > 0 and not list(tmp_path.iterdir())
    assert "24 images" in caplog.text and "9 updates" in caplog.text


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_the_length_of_the_run_leaves_without_effect_is_a_warning(
    dry_run: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"lr_scheduler": "step", "lr_step_epochs": 30, "lr_warmup_steps": 50, "early_stopping": 9}
    trained(tmp_path, **given, loss_type="beta_vae", num_epochs=1, dry_run=dry_run)
    for word in ("--lr_step_epochs 30", "warm-up of 50", "--early_stopping 9", "--beta_steps 1000"):
        assert sum(word in record.getMessage() for record in caplog.records) == 1


def test_checkpoints_and_previews_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, original = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (saved.append(a[1]), original(*a, **k)))
    result = trained(tmp_path, save_every_n_steps=2, save_every=3, log_images_every_n_steps=4, num_epochs=3)
    assert saved == [2, 4, 6, 8, 9]
    names = sorted(path.name for path in (result.folder / "samples").iterdir())
    assert names == [f"{kind}-{n:06}.png" for kind in ("reconstructions", "samples") for n in (4, 8, 9)]


@pytest.mark.parametrize("changes", [SMALL, SPATIAL])
def test_training_only_the_decoder_keeps_latents_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = trained(tmp_path / "first", **{**changes, "num_epochs": 1, "init": "orthogonal"})
    more = {"init_from": str(first.last), "train": "decoder", "ema_decay": 0.5, "optimizer": "muon"}
    second = trained(tmp_path / "second", **{**changes, **more})
    before, after = (loading.open_network(result.last) for result in (first, second))
    for (name, one), (_, other) in zip(
        tree_flatten(before.parameters()), tree_flatten(after.parameters()), strict=True
    ):
        assert np.array_equal(one, other) == name.startswith(("encoder.", "quant_conv.")), name
    with pytest.raises(SettingsError, match="init_from"):
        trained(tmp_path / "third", train="decoder")


def test_dropout_is_a_function_of_keys_with_gradient_checkpointing(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderKL", "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8]}
    config |= {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2, "dropout": 0.4, "sample_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changes = {**SMALL, "network_config": str(tmp_path / "config.json"), "num_epochs": 1, "data_count": 20}
    plain, again = (
        trained(tmp_path / name, **changes, gradient_checkpointing=name == "again") for name in ("plain", "again")
    )
    assert plain.last.read_bytes() == again.last.read_bytes()
    (tmp_path / "config.json").write_text(json.dumps({**config, "dropout": 0.0}))
    assert trained(tmp_path / "none", **changes).last.read_bytes() != plain.last.read_bytes()


def test_networks_from_a_config_and_from_weights(tmp_path: Path) -> None:
    first = trained(tmp_path / "first", num_epochs=1)
    network = build(settings_from_dict({**SMALL, "init_from": str(first.last)}))
    opened = loading.open_network(first.last)
    for (_, one), (_, other) in zip(tree_flatten(network.parameters()), tree_flatten(opened.parameters()), strict=True):
        np.testing.assert_array_equal(one, other)
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"_class_name": "PlainAutoencoder", "channels": [4, 8], "in_channels": 1, "out_channels": 1})
    )
    described = build(settings_from_dict({**SMALL, "network_config": str(file)}))
    assert latent_shape(described, 12) == (6, 6, 4)


@pytest.mark.parametrize("changes", [SMALL, SPATIAL, {**SMALL, "network": "plain"}])
def test_recomputed_blocks_have_the_same_gradients_and_statistics(changes: dict[str, Any]) -> None:
    from mflux_vae.networks.layers import batch_statistics, fold_statistics

    network = build(settings_from_dict(changes))
    network.train()
    start = tree_flatten(network.parameters())
    pixels = mx.random.normal((2, 12, 12, 1), key=mx.random.key(0))

    def loss(network: Any) -> mx.array:
        posterior = network.encode(pixels)
        value = mx.square(network.decode(posterior.mean)).mean() + posterior.kl().mean()
        fold_statistics(network, batch_statistics(network))
        return value

    def computed() -> tuple[Any, ...]:
        network.update(tree_unflatten(start))
        value, gradients = nn.value_and_grad(network, loss)(network)
        mx.eval(value, gradients, network.parameters())
        return value, gradients, network.parameters()

    plain = tree_flatten(computed())
    assert recompute_blocks(network) >= 2
    for (name, one), (_, other) in zip(plain, tree_flatten(computed()), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("network", ["kl", "plain"])
def test_penultimate_features_are_the_last_layers_input(network: str) -> None:
    built = build(settings_from_dict({**SPATIAL, "network": network}))
    z = mx.random.normal((1, 6, 6, 3), key=mx.random.key(0))
    np.testing.assert_allclose(
        built.decoder.conv_out(penultimate_features(built, z)), built.decode(z), rtol=1e-4, atol=1e-5
    )


def test_perceptual_distance_from_two_files(tmp_path: Path) -> None:
    network = LPIPS()
    network.linear = [mx.abs(weight) for weight in network.linear]
    tensors = from_mlx(dict(tree_flatten(network.parameters())), TABLE)
    for name, of_vgg in (("vgg16", True), ("channels", False)):
        part = {key: value for key, value in tensors.items() if key.startswith("features.") == of_vgg}
        write_safetensors(tmp_path / f"{name}.safetensors", part)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("vgg16", "channels")]
    small = {"image_size": 16, "data_count": 4, "val_share": 0.25, "batch_size": 3, "num_epochs": 1, "seed": 1}
    plain = trained(tmp_path / "plain", **small, lpips_weight=0, lpips=files)
    seen = trained(tmp_path / "seen", **small, lpips=files)
    first, other = (lines(result.folder / "metrics.jsonl")[0] for result in (plain, seen))
    assert other["rec"] > first["rec"] and other["kl"] == first["kl"]
    with pytest.raises(SettingsError, match="lpips"):
        trained(tmp_path / "three", lpips=[*files, "more"])


def test_events_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    result = trained(tmp_path, num_epochs=1, tensorboard=True)
    (file,) = (result.folder / "tensorboard").iterdir()
    assert b"validation/psnr" in file.read_bytes() and b"train/loss" in file.read_bytes()
