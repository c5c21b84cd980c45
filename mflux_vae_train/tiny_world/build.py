"""Train an embedded pipeline from scratch: `python -m mflux_vae_train.tiny_world.build tiny --work DIR`.

The autoencoder is trained first, then denoiser and text encoders on its latents. An interrupted build continues when
it is started again. Two CPU cores need an hour or two. All numbers are in `recipe.py` and `vae.yaml`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae import VAE
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.utils.console import prepare_streams
from mflux_vae.weights.formats.files import write_json
from mflux_vae_train import pipelines
from mflux_vae_train.settings.flags import from_yaml
from mflux_vae_train.tiny_world import corpus, recipe, untrained
from mflux_vae_train.tiny_world.evaluate import accuracy, sample_images
from mflux_vae_train.tiny_world.train import train
from mflux_vae_train.tiny_world.world import evaluation_prompts
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.train import VAETrainer

logger = logging.getLogger(__name__)

SCALING_SCENES = 512
"""Number of scenes that scale and shift of the latents are measured on."""


PIPELINES = {
    "tiny": (recipe.FLUX, untrained.new_flux),
    "tiny-sd": (recipe.STABLE_DIFFUSION, untrained.new_stable_diffusion),
}
"""By name: settings, and function for an untrained pipeline."""


def autoencoder(work: Path, settings: VAETrainingSettings, config: AutoencoderKLConfig, photos: Sequence[Path]) -> VAE:
    """Train an autoencoder, with latents of zero mean and unit deviation over scenes; stored in `work`."""
    folder = work / "autoencoder"
    if not (folder / "config.json").is_file():
        write_json(work / "autoencoder.json", config.to_dict())
        settings = replace(settings, network_config=str(work / "autoencoder.json"))
        shape = {"size": settings.image_size, "channels": settings.in_channels}
        source = corpus.TrainingImages(
            corpus.photographs(photos), seed=settings.seed, count=settings.data_count, **shape
        )
        trainer = VAETrainer(replace(settings, output_dir=str(work)), source=source)
        trainer.train()
        network = trainer.network
        pixels = mx.array(corpus.scenes(settings.seed, SCALING_SCENES, recipe.SIZE)).astype(mx.float32) / 127.5 - 1
        latents = np.concatenate([np.array(network.encode(part).mode()) for part in mx.split(pixels, 8)])
        shift, scale = round(float(latents.mean()), 4), round(float(1 / latents.std()), 4)
        in_layers = config.use_quant_conv and config.use_post_quant_conv
        scaled = AutoencoderKL(
            replace(config, scaling_factor=scale, shift_factor=config.shift_factor if in_layers else shift)
        )
        scaled.update(network.parameters())
        if in_layers:
            _shift_latents(scaled, shift)
        VAE(network=scaled).save_pretrained(folder)
    return VAE.from_pretrained(folder)


def _shift_latents(network: AutoencoderKL, shift: float) -> None:
    """Subtract `shift` from latents in the layers beside them: Stable Diffusion's pipelines read no `shift_factor`."""
    before, after = network.quant_conv, network.post_quant_conv
    means = mx.arange(before.bias.size) < network.config.latent_channels
    before.bias = mx.where(means, before.bias - shift, before.bias)
    after.bias = after.bias + shift * after.weight.sum(axis=(1, 2, 3))


def build(name: str, work: Path, output: Path, photos: Sequence[Path]) -> dict[str, object]:
    """Train what is missing in `work`, write the pipeline to `output`, and measure its accuracy."""
    settings, new_pipeline = PIPELINES[name]
    work.mkdir(parents=True, exist_ok=True)
    vae = autoencoder(work, from_yaml(VAETrainingSettings, recipe.VAE_SETTINGS), settings.vae, photos)
    joint = new_pipeline(work, vae, settings.rounds[0])
    train(work, name, joint, settings.rounds)
    pipeline = joint.pipeline
    pipeline.save_pretrained(output, dtype="float16")
    figures: dict[str, object] = {}
    for kind, seen in (("seen", True), ("unseen", False)):
        prompts, truths = zip(*evaluation_prompts(seen), strict=True)
        measured = accuracy(sample_images(pipeline, prompts, seed=0), truths)
        logger.info("%s combinations: %s", kind, measured)
        figures[kind] = measured.all
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=PIPELINES, help="name of the embedded pipeline")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints; use the same one to resume")
    parser.add_argument("--output", type=Path, help="folder of the pipeline (default: this package's)")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="more photographs for the autoencoder")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    embedded = Path(pipelines.__file__).parent / arguments.pipeline.replace("-", "_") / "weights"
    output = arguments.output or embedded
    print(json.dumps(build(arguments.pipeline, arguments.work, output, arguments.photos)))


if __name__ == "__main__":
    main()
