"""DreamBooth beside diffusers' scripts: seconds of the whole command, and what both adapters have learned.

    python -m benchmarks.diffusers_scripts --scripts FOLDER [--python PATH] [--pipelines tiny tiny-sd]
                                           [--steps 60 400] [--seeds 1] [--json]

FOLDER holds `train_dreambooth_lora.py` and `train_dreambooth_lora_flux.py`, from examples/dreambooth of diffusers'
repository, not newer than the diffusers of PATH, a Python with diffusers, transformers, peft, accelerate and
torchvision (default: this one). A folder in diffusers' layout can take the place of a pipeline's name.

The commands run one after the other, each from its start to the saved adapter, after one update of each that is not
timed. The same flags state images, class images, prompts, rank, layers, batch, AdamW, learning rate, schedule, weight
of the class images, seed and number of updates. `ratio` is their seconds divided by ours. The figures of
`dreambooth_quality` are measured for both adapters by the same code: the pipeline of this package with the adapter's
file loaded.

What differs:

- Random numbers: order of the images, noise, noise levels (uniform in both), and the adapter's initial weights, which
  are normal there and uniform here.
- Latents: `train_dreambooth_lora.py` encodes images in every update, as it has no cache; `--cache_latents` lets the
  script of FLUX encode them once, as ours does.
- Prompts: `--pre_compute_text_embeddings` lets `train_dreambooth_lora.py` encode them once, as ours does; the script of
  FLUX encodes them in every update.
- Besides the adapter, ours writes a checkpoint, loss curves and a report; theirs open the whole pipeline anew and load
  the adapter into it.

The class images are drawn before, by this package: the script of FLUX draws them at 1024 pixels, which a pipeline for
64 pixels cannot. It also encodes prompts with 77 tokens of CLIP, so the copy of `tiny` that it opens has zeros as
further position embeddings; CLIP reads from left to right, so its outputs are the same.

Measured on 2026-11-30 (AMD EPYC, two cores, diffusers 0.42.1, torch 2.14.1), one seed; ours / theirs
(class retention: the share of class pictures that show the class and not the whole subject):

| | seconds | ratio | fidelity | class retention |
|---|---|---|---|---|
| `tiny`, 60 updates | 4.93 / 18.07 | 3.66 | 0.44 / 0.22 | 0.41 / 0.27 |
| `tiny`, 400 | 27.04 / 57.35 | 2.12 | 1.00 / 1.00 | 0.68 / 0.45 |

The ratios of another run were 3.32 and 1.89, and with AVX-512 and torch 2.13 3.95 (4.02 / 15.87 s) and 2.02 (18.43 /
37.23 s). Updates take 0.065 s and 0.116 s; the rest of the command takes 1 s and 11 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image
from tqdm import tqdm

from benchmarks.dreambooth_quality import TOKEN, Measured, measure
from benchmarks.harness.machine import describe
from benchmarks.harness.process import ROOT
from mflux_vae.errors import InputError
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.optimization.trainable import adapter_names
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.tiny_world.evaluate import sample_images
from mflux_vae_train.tiny_world.words import article
from mflux_vae_train.tiny_world.world import SUBJECTS, subject_images

INSTANCE_IMAGES, CLASS_IMAGES, BATCH = 4, 12, 4
"""Whole batches: the scripts would end an epoch with a smaller one."""

CLASS_SEED = 99
CLIP_TOKENS = 77
ADAPTER = "pytorch_lora_weights.safetensors"
OURS = (
    *("--weighting_scheme=uniform", "--caption_dropout=0", "--num_validation_images=0"),
    *("--checkpointing_steps=none", "--report_to=none"),
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script of diffusers.

    Attributes:
        layers: those that it adapts unless a flag states others.
        flags: of this script alone, formatted with the `rank` and the `tokens` of a prompt.
    """

    name: str
    layers: str
    flags: Sequence[str]


SCRIPTS: Mapping[str, Script] = {
    "StableDiffusionPipeline": Script(
        name="train_dreambooth_lora.py",
        layers="to_k,to_q,to_v,to_out.0",
        flags=["--pre_compute_text_embeddings"],
    ),
    "FluxPipeline": Script(
        name="train_dreambooth_lora_flux.py",
        layers="attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
        "attn.to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
        flags=["--cache_latents", "--weighting_scheme=none", "--lora_alpha={rank}", "--max_sequence_length={tokens}"],
    ),
}
"""By the class in a pipeline's model_index.json."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Folders of one pipeline.

    Attributes:
        model: name or folder of the pipeline.
        script: file of the script; python: the interpreter that runs it.
        data: folder with the pipeline as `pipeline`, photographs as `images-SEED`, and class images as `class`.
    """

    model: str
    script: Path
    python: str
    data: Path

    def command(self, whose: str, steps: int, seed: int, output: Path) -> list[str]:
        """The command line of "ours" or "theirs", which writes its adapter to `output`."""
        recommended, shape = open_pipeline(self.model).recommended, SUBJECTS[0].shape
        folder, script = self.data / "pipeline", _script(self.data / "pipeline")
        flags = [
            f"--instance_data_dir={self.data / f'images-{seed}'}",
            f"--instance_prompt=a photo of {TOKEN} {shape}",
            *("--with_prior_preservation", f"--class_data_dir={self.data / 'class'}"),
            *(f"--class_prompt=a photo of {article(shape)} {shape}", f"--num_class_images={CLASS_IMAGES}"),
            *(f"--prior_loss_weight={recommended.prior_loss_weight}", f"--output_dir={output}"),
            *(f"--resolution={recommended.resolution}", "--center_crop", f"--rank={recommended.rank}"),
            *(f"--train_batch_size={BATCH}", "--gradient_accumulation_steps=1", f"--max_train_steps={steps}"),
            *(f"--learning_rate={recommended.learning_rate}", "--lr_scheduler=cosine"),
            *(f"--lr_warmup_steps={steps // 20}", "--adam_weight_decay=1e-4", f"--seed={seed}"),
        ]
        if whose == "ours":
            program = [sys.executable, "-m", "mflux_vae_train.dreambooth.cli"]
            return [*program, f"--model={self.model}", *flags, f"--lora_layers={script.layers}", *OURS]
        tokens = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
        alone = [flag.format(rank=recommended.rank, tokens=tokens) for flag in script.flags]
        program = [self.python, str(self.script), f"--pretrained_model_name_or_path={folder}"]
        return [*program, *flags, f"--checkpointing_steps={steps + 1}", *alone]

    def seconds(self, whose: str, steps: int, seed: int, output: Path) -> float:
        """Time one command.

        Raises:
            RuntimeError: it fails; names its last line.
        """
        command = self.command(whose, steps, seed, output)
        # bytecode is kept, as that of installed packages
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{whose}: {(done.stderr.strip() or 'failed without a word').splitlines()[-1]}")
        return time.monotonic() - began

    def run(self, steps: int, seed: int, base: Measured) -> dict[str, Any]:
        """Both commands, and what their adapters have learned."""
        found: dict[str, Measured] = {}
        layers: dict[str, Sequence[str]] = {}
        for whose in ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as output:
                seconds = self.seconds(whose, steps, seed, Path(output))
                pipeline = open_pipeline(self.model)
                loaded = lora.load_adapter(
                    {pipeline.adapter_prefix: pipeline.denoiser}, Path(output) / ADAPTER, adapter_names(pipeline)
                )
            layers[whose] = loaded[pipeline.adapter_prefix]
            found[whose] = measure(pipeline, SUBJECTS[0], base, seconds)
        if layers["ours"] != layers["theirs"]:
            raise RuntimeError(
                f"{self.model}: adapted layers differ, {len(layers['ours'])} and {len(layers['theirs'])}"
            )
        ratio = found["theirs"].seconds / found["ours"].seconds
        named = {"pipeline": Path(self.model).name, "steps": steps, "seed": seed, "ratio": ratio}
        return {**named, **{whose: asdict(measured) for whose, measured in found.items()}}


def prepare(model: str, scripts: Path, python: str, data: Path, seeds: Sequence[int]) -> Comparison:
    """Write what both commands read.

    Raises:
        InputError: no such pipeline.
        FileNotFoundError: its script is missing.
    """
    pipeline = open_pipeline(model)
    pipeline.save_pretrained(data / "pipeline", dtype="float32")
    script = scripts.resolve() / _script(data / "pipeline").name
    if not script.is_file():
        raise FileNotFoundError(f"--scripts {scripts}: no {script.name}; it is in diffusers' examples/dreambooth")
    if script.name == SCRIPTS["FluxPipeline"].name:
        _lengthen_clip(data / "pipeline/text_encoder")
    subject = SUBJECTS[0]
    for seed in seeds:
        _save(subject_images(subject, INSTANCE_IMAGES, seed=seed), data / f"images-{seed}")
    prompt = f"a photo of {article(subject.shape)} {subject.shape}"
    _save(sample_images(pipeline, [prompt] * CLASS_IMAGES, seed=CLASS_SEED), data / "class")
    return Comparison(model=model, script=script, python=python, data=data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scripts", type=Path, required=True, help="folder with diffusers' scripts")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs them (default: this one)")
    parser.add_argument("--pipelines", nargs="+", default=["tiny", "tiny-sd"], help="names or folders")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 400], help="numbers of updates (default 60 400)")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.seeds)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            comparisons = [
                prepare(model, arguments.scripts, arguments.python, Path(folder) / str(index), seeds)
                for index, model in enumerate(arguments.pipelines)
            ]
        except (InputError, FileNotFoundError) as error:
            parser.error(str(error))
        if not arguments.json:
            print(describe(), _versions(arguments.python), sep="\n")
            columns = ("seconds", "subject_fidelity", "class_retention", "diversity", "prompts")
            head = "".join(f"{name:>18}" for name in columns)
            print(f"{'pipeline':12}{'steps':>6}{'seed':>5}{'ratio':>7} {'':6}{head}", flush=True)
        for one in comparisons:
            for whose in ("ours", "theirs"):
                one.seconds(whose, 1, 0, Path(folder) / f"unused-{whose}-{one.data.name}")
            base = measure(open_pipeline(one.model), SUBJECTS[0])
            plan = [(steps, seed) for steps in arguments.steps for seed in seeds]
            for steps, seed in tqdm(plan, desc=one.model, file=sys.stderr, disable=None):
                results.append(row := one.run(steps, seed, base))
                if arguments.json:
                    continue
                for whose in ("ours", "theirs"):
                    shown = "".join(f"{row[whose][name]:18.2f}" for name in columns)
                    print("{pipeline:12}{steps:>6}{seed:>5}{ratio:7.2f}".format(**row), f"{whose:6}{shown}", flush=True)
    if arguments.json:
        print(json.dumps({"machine": describe(), "peer": _versions(arguments.python), "runs": results}))
    return 0


def _script(folder: Path) -> Script:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if name not in SCRIPTS:
        raise InputError(f"no script of diffusers trains a {name} of this size; expected {' or '.join(SCRIPTS)}")
    return SCRIPTS[name]


def _lengthen_clip(folder: Path) -> None:
    """Give CLIP position embeddings for 77 tokens, zeros where it has none."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CLIP_TOKENS}))
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = next(name for name in tensors if name.endswith("position_embedding.weight"))
    tensors[name] = mx.pad(tensors[name], ((0, CLIP_TOKENS - len(tensors[name])), (0, 0)))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def _save(images: Any, folder: Path) -> None:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")


def _versions(python: str) -> str:
    code = (
        "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('diffusers', 'torch')), sep=', ')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
