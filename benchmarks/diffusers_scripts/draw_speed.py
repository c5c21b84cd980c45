"""Images with an adapter on the embedded pipeline: `mflux-dreambooth draw` against diffusers' FluxPipeline.

    python -m benchmarks.diffusers_scripts.draw_speed [--json]

Both encode the prompt, draw from the same noise with the same LoRA of rank 16 on all attention layers, and decode; the
model and the adapter are loaded before.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.backends import mlx_work, torch_device, torch_work
from benchmarks.harness.cli import Options, main
from benchmarks.harness.process import ROOT
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import noise, tensor

WEIGHTS = ROOT / "mflux_vae_train" / "pipelines" / "tiny" / "weights"
PROMPT = "a photo of a red star on snow"
SIDE, CHANNELS, TOKENS, RANK, GUIDANCE = 64, 16, 16, 16, 2.5


def rows(options: Options) -> list[Row]:
    """The measurements."""
    steps = 4 if options.quick else 14
    return [_row(count, steps, options.gpu) for count in (1, 4)]


def _row(count: int, steps: int, gpu: bool) -> Row:
    work: dict[str, Any] = {"count": count, "steps": steps}
    here = "benchmarks.diffusers_scripts.draw_speed"
    return Row(
        work=f"tiny pipeline with a LoRA, draw {count} of {SIDE} x {SIDE}, {steps} steps",
        ours=Implementation(
            name="mflux-vae",
            build=f"{here}:ours",
            settings=work,
            imports=("mflux_vae_train.dreambooth.drawing.adapted",),
            units=count,
        ),
        peers=[
            Implementation(
                name="diffusers",
                build=f"{here}:theirs",
                settings={**work, "gpu": gpu},
                imports=("diffusers", "peft", "torch", "diffusers.pipelines.flux.pipeline_flux"),
                units=count,
            )
        ],
        unit="images",
    )


def ours(count: int, steps: int) -> Work:
    """The adapted pipeline of the command, with noise that diffusers can start from, too."""
    import mlx.core as mx

    from mflux_vae_train.dreambooth.drawing.adapted import open_adapted
    from mflux_vae_train.dreambooth.drawing.source import LAST, Source

    start, key = mx.array(_noise(count)), mx.zeros((count, 2), mx.uint32)
    with tempfile.TemporaryDirectory() as folder:
        file = _adapter(Path(folder))
        adapted = open_adapted(Source(path=str(file), model="tiny", adapters={LAST: file}))
        with adapted.using(LAST) as pipeline:
            mx.eval(pipeline.denoiser.parameters())

    def run() -> dict[str, mx.array]:
        row = adapted.pipeline.encode_prompts([PROMPT])
        rows = {name: mx.repeat(array, count, axis=0) for name, array in row.items()}
        options: Any = {"size": (SIDE, SIDE), "steps": steps, "guidance": GUIDANCE, "key": key, "latents": start}
        with adapted.using(LAST) as pipeline:
            return {"images": (pipeline.sample(rows, **options) + 1) / 2}

    return mlx_work(run)


def theirs(count: int, steps: int, gpu: bool) -> Work:
    """diffusers' pipeline."""
    import torch
    from diffusers import FluxPipeline

    device = torch_device(gpu)
    pipeline = FluxPipeline.from_pretrained(WEIGHTS).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.load_lora_weights(folder, weight_name=_adapter(Path(folder)).name)
    start = torch.from_numpy(_noise(count).transpose(0, 3, 1, 2).copy()).to(device)
    packed = pipeline._pack_latents(start, *start.shape)

    def run() -> dict[str, np.ndarray]:
        drawn = pipeline(
            PROMPT,
            negative_prompt="",
            num_images_per_prompt=count,
            height=SIDE,
            width=SIDE,
            latents=packed,
            num_inference_steps=steps,
            true_cfg_scale=GUIDANCE,
            max_sequence_length=TOKENS,
            output_type="np",
        )
        return {"images": drawn.images}

    return torch_work(run, device)


def _noise(count: int) -> np.ndarray:
    return noise("draw", (count, SIDE // 8, SIDE // 8, CHANNELS))


def _adapter(folder: Path) -> Path:
    """An adapter of all attention projections of the transformer, in PEFT's naming."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tensors, ends = {}, (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    with safe_open(WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors", "np") as file:
        for key in filter(lambda key: key.endswith(ends), file.keys()):
            (outputs, inputs), layer = file.get_slice(key).get_shape(), f"transformer.{key.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = tensor(f"{layer}.a", (RANK, inputs))
            tensors[f"{layer}.lora_B.weight"] = tensor(f"{layer}.b", (outputs, RANK), gain=0.1)
    save_file(tensors, path := folder / "adapter.safetensors", {"format": "pt"})
    return path


if __name__ == "__main__":
    sys.exit(main({"draw_speed": rows}, __doc__))
