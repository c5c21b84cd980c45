"""Images of a data set to latents and back, by the autoencoder that was trained on them or by another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.images import save_image, to_pictures, to_pixels
from mflux_vae.metrics import image as metrics
from mflux_vae_train.settings.flags import from_yaml
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.evaluation.validation import pairs
from mflux_vae_train.vae.plan import images_of
from mflux_vae_train.vae.sampler import VAESampler

FILE = "reconstructions.png"


def reconstruct_data(
    model: str, *, output: str | None, data: str | None, held_out: bool, count: int, as_json: bool = False
) -> None:
    """Measures, and shows where there is an `output` folder, the first images of a training's data.

    Args:
        model: a run's best_model.safetensors or last_model.safetensors; or with `data` any autoencoder.
        data: what to take in place of the run's own data; see `data.open_data`.
        held_out: images that were not trained on, in place of those that were.
        count: so many, or all where there are fewer.

    Raises:
        SettingsError: it is not known what the model was trained on.
        ImageError, WeightsError: data or model cannot be read.
    """
    sampler = VAESampler(model)
    settings = _settings(model, data)
    shape = {"image_size": sampler.image_size, "in_channels": sampler.model.config.in_channels}
    source = images_of(dataclasses.replace(settings, **shape))[held_out]
    originals = np.stack([source.item(index) for index in range(min(count, len(source)))])
    parts = np.split(originals, range(64, len(originals), 64))
    made = [sampler.decode(sampler.model.encode(mx.array(to_pixels(part))).mean) for part in parts]
    again = to_pictures(np.concatenate(made) * 2 - 1)
    one, other = (np.moveaxis(pictures, -1, 1).astype(np.float32) for pictures in (originals, again))
    measured = {
        "images": len(originals),
        "held_out": held_out,
        "psnr": float(np.mean(np.array(metrics.psnr(one, other)))),
        "ssim": float(np.mean(np.array(metrics.ssim(one, other)))) if sampler.image_size >= metrics.WINDOW else None,
    }
    if output:
        save_image(Path(output) / FILE, pairs(originals, again))
    if as_json:
        print(json.dumps({"model": model, **measured}, indent=2))
        return
    ssim = "" if measured["ssim"] is None else f", SSIM {measured['ssim']:.4f}"
    kind = "held-out" if held_out else "training"
    print(f"{len(originals)} {kind} images: PSNR {measured['psnr']:.2f} dB{ssim}")
    if output:
        print(Path(output) / FILE)


def _settings(model: str, data: str | None) -> VAETrainingSettings:
    file = Path(model).with_name("settings.yaml")
    known = from_yaml(VAETrainingSettings, file) if file.is_file() else None
    if known is None and data is None:
        raise SettingsError(f"there is no {file} that says what {model} was trained on: give PICTURES, or --data")
    if data is None:
        assert known is not None
        return known
    base = known or VAETrainingSettings()
    return dataclasses.replace(base, data=data, data_kind=None, data_list=None)
