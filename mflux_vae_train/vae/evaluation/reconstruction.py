"""Reconstruct images of a data set with an autoencoder and measure the error."""

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
from mflux_vae_train.vae.evaluation.validation import comparison_grid
from mflux_vae_train.vae.plan import open_images
from mflux_vae_train.vae.sampler import VAESampler

FILE = "reconstructions.png"


def reconstruct_data(
    model: str, *, output: str | None, data: str | None, held_out: bool, count: int, as_json: bool = False
) -> None:
    """Reconstruct the first images of a data set, print PSNR and SSIM, and write a picture to `output`, if given.

    Args:
        model: best_model.safetensors or last_model.safetensors of a run; with `data` any autoencoder.
        data: replaces the data of the run; see `batches.open_data`.
        held_out: use the held-out images instead of the training images.
        count: largest number of images.

    Raises:
        SettingsError: the model has no settings.yaml and there is no `data`.
        ImageError, WeightsError: data or model cannot be read.
    """
    sampler = VAESampler(model)
    settings = _data_settings(model, data)
    shape = {"image_size": sampler.image_size, "in_channels": sampler.model.config.in_channels}
    source = open_images(dataclasses.replace(settings, **shape))[held_out]
    originals = np.stack([source.item(index) for index in range(min(count, len(source)))])
    parts = np.split(originals, range(64, len(originals), 64))
    reconstructions = [sampler.decode(sampler.model.encode(mx.array(to_pixels(part))).mean) for part in parts]
    reconstructed = to_pictures(np.concatenate(reconstructions) * 2 - 1)
    target, result = (np.moveaxis(pictures, -1, 1).astype(np.float32) for pictures in (originals, reconstructed))
    measured = {
        "images": len(originals),
        "held_out": held_out,
        "psnr": float(np.mean(np.array(metrics.psnr(target, result)))),
        "ssim": float(np.mean(np.array(metrics.ssim(target, result))))
        if sampler.image_size >= metrics.WINDOW
        else None,
    }
    if output:
        save_image(Path(output) / FILE, comparison_grid(originals, reconstructed))
    if as_json:
        print(json.dumps({"model": model, **measured}, indent=2))
        return
    ssim = "" if measured["ssim"] is None else f", SSIM {measured['ssim']:.4f}"
    kind = "held-out" if held_out else "training"
    print(f"{len(originals)} {kind} images: PSNR {measured['psnr']:.2f} dB{ssim}")
    if output:
        print(Path(output) / FILE)


def _data_settings(model: str, data: str | None) -> VAETrainingSettings:
    file = Path(model).with_name("settings.yaml")
    known = from_yaml(VAETrainingSettings, file) if file.is_file() else None
    if known is None and data is None:
        raise SettingsError(f"{model}: unknown training data, there is no {file}; give images or --data")
    if data is None:
        assert known is not None
        return known
    base = known or VAETrainingSettings()
    return dataclasses.replace(base, data=data, data_kind=None, data_list=None)
