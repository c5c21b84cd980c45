"""Both training commands with MLX's launcher: two processes write the same files as one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.pipelines import tiny
from mflux_vae_train.training.hooks import read_metrics
from tests.mflux_vae_train.distributed.launch import ROOT, THREADS, TIMEOUT, launch, ring

pytestmark = pytest.mark.slow

EXAMPLE = Path(tiny.__file__).parent / "example"


# AdamW turns the rounding of gradients near zero into steps as large as the learning rate. Hence a larger epsilon, or
# a network without biases in front of a norm or of attention's keys, whose gradients are zero except for rounding.


def dreambooth(output: Path, *options: object) -> list[object]:
    given = {
        "model": "tiny", "instance_data_dir": EXAMPLE, "instance_prompt": "a photo of xyz star", "output_dir": output,
        "num_class_images": 3, "max_train_steps": 3, "lr_warmup_steps": 1, "gradient_accumulation_steps": 3,
        "lora_dropout": 0.1, "num_validation_images": 2, "validation_steps": 2, "checkpointing_steps": 2,
        "adam_epsilon": 1e-3,
    }  # fmt: skip
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "mflux_vae_train.dreambooth.cli", *flags, *options]


def autoencoder(output: Path, *more: object, batch: int, accumulation: int, epochs: int = 2) -> list[object]:
    flags = (
        f"--network plain --hidden_dims 12 12 --latent_dim 2 --data digits --data_count 96"
        f" --image_size 24 --batch_size {batch} --gradient_accumulation_steps {accumulation} --num_epochs {epochs}"
        f" --lr_scheduler constant --experiment_name few --learning_rate 1e-3"
    )
    return [sys.executable, "-m", "mflux_vae.cli", "train", *flags.split(), "--output_dir", output, *more]


def alone(command: list[object]) -> None:
    """With the number of threads of the other runs, on which the rounding of matrix products depends."""
    arguments = [str(part) for part in command]
    subprocess.run(arguments, check=True, capture_output=True, timeout=TIMEOUT, cwd=ROOT, env={**os.environ, **THREADS})


def near(one: Path, other: Path) -> None:
    """Weights within 1e-5 of the norm of each array."""
    ours, theirs = (mx.load(str(path)) for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        difference = np.linalg.norm(np.array(array - theirs[name], np.float32))
        assert difference <= 1e-5 * np.linalg.norm(np.array(theirs[name], np.float32)), name


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DreamBooth run of one process."""
    folder = tmp_path_factory.mktemp("one") / "out"
    alone(dreambooth(folder))
    return folder


def test_dreambooth(one: Path, tmp_path: Path) -> None:
    done = launch(2, dreambooth(tmp_path / "out"))
    assert "exited with code" not in done.stderr, done.stderr
    assert done.stdout.count("continuing") == 0 and done.stdout.count("generated 3 class") == 1
    near(tmp_path / "out" / "pytorch_lora_weights.safetensors", one / "pytorch_lora_weights.safetensors")
    assert files(tmp_path / "out") == files(one)
    for index in range(3):
        name = f"class_images/class-{index:05}.png"
        assert (tmp_path / "out" / name).read_bytes() == (one / name).read_bytes()


def test_dreambooth_resumes_with_one_process_after_another_was_killed(one: Path, tmp_path: Path) -> None:
    """The last of three is killed in the update after a checkpoint."""
    killed = (
        "import os, signal, sys\nfrom mflux_vae_train.training import step\n"
        "from mflux_vae_train.dreambooth import cli\n"
        "call = step.Step.__call__\n"
        "def killing(self, update, *rest):\n"
        "    if update == 2 and self.processes.rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return call(self, update, *rest)\n"
        "step.Step.__call__ = killing; sys.exit(cli.main())"
    )
    command = dreambooth(tmp_path / "out")
    results = ring(3, [sys.executable, "-c", killed, *command[3:]])
    assert [status for status, _ in results] == [1, 1, -9]
    assert all("error: process 3 of 3 ended without a message" in said for _, said in results[:2])
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    alone(command)
    near(tmp_path / "out" / "pytorch_lora_weights.safetensors", one / "pytorch_lora_weights.safetensors")
    assert [line["update"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3]


FAKE = (
    "import sys; from mflux_vae_train.pipelines import registry; from mflux_vae_train.dreambooth import cli\n"
    "from tests.contracts.fake import FakePipeline\n"
    "registry.open_pipeline = lambda *_, **__: FakePipeline()\n"
    "sys.exit(cli.main())"
)


def fake(output: Path) -> list[object]:
    """DreamBooth on a fast pipeline with five class images and previews."""
    more = {"resolution": 16, "num_class_images": 5, "num_validation_images": 5, "sample_batch_size": 1}
    more |= {"gradient_accumulation_steps": 4, "adam_epsilon": 1e-3, "validation_share": 0.5}
    command = dreambooth(output, *(part for name, value in more.items() for part in (f"--{name}", value)))
    return [sys.executable, "-c", FAKE, *command[3:]]


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run of one process."""
    folder = tmp_path_factory.mktemp("faked") / "out"
    alone(fake(folder))
    return folder


@pytest.mark.parametrize("count", [2, 4])
def test_images_latents_and_previews_equal_those_of_one_process(count: int, faked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for status, said in ring(count, fake(out)):
        assert status == 0, said
    assert files(out) == files(faked)
    shared = [name for name in files(faked) if name.startswith(("class_images", "encodings", "samples/step-00000"))]
    assert sum(name.startswith("class_images") for name in shared) == 5 and len(shared) > 10
    for name in shared:
        assert (out / name).read_bytes() == (faked / name).read_bytes(), name
    near(out / "pytorch_lora_weights.safetensors", faked / "pytorch_lora_weights.safetensors")
    untrained = [read_metrics(folder / "metrics.jsonl")[0] for folder in (out, faked)]
    assert untrained[0] == untrained[1] and "held_out_loss" in untrained[0]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2)])
def test_a_run_resumes_with_more_or_fewer_processes(before: int, after: int, faked: Path, tmp_path: Path) -> None:
    """From the checkpoint of the second update, without any later file."""
    out = tmp_path / "out"
    if before == 1:
        shutil.copytree(faked, out)
    else:
        for status, said in ring(before, fake(out)):
            assert status == 0, said
    shutil.rmtree(out / "checkpoint-3")
    (out / "pytorch_lora_weights.safetensors").unlink()
    results = ring(after, fake(out))
    assert [status for status, _ in results] == [0] * after, results
    assert "continuing after update 2" in (out / "train.log").read_text()
    assert files(out) == files(faked)
    near(out / "pytorch_lora_weights.safetensors", faked / "pytorch_lora_weights.safetensors")


def test_invalid_input_ends_all_processes(tmp_path: Path) -> None:
    results = ring(2, dreambooth(tmp_path / "out", "--resume_from_checkpoint", "nowhere"))
    assert [status for status, _ in results] == [2, 1]
    assert "nowhere is not a folder" in results[0][1] and "process 1 of 2 stopped" in results[1][1]


def test_an_autoencoder(tmp_path: Path) -> None:
    """Two processes, and one with batches of twice the size."""
    done = launch(2, autoencoder(tmp_path / "two", batch=8, accumulation=2))
    assert "exited with code" not in done.stderr, done.stderr
    alone(autoencoder(tmp_path / "one", batch=16, accumulation=1))
    two, one = (tmp_path / name / "checkpoints" / "few" for name in ("two", "one"))
    near(two / "last_model.safetensors", one / "last_model.safetensors")
    assert files(two) == files(one) and done.stdout.count("best loss") == 1


def test_an_autoencoder_and_its_discriminator_resume_with_another_number_of_processes(tmp_path: Path) -> None:
    discriminator = ("--disc_start", 2)
    for status, said in ring(2, autoencoder(tmp_path / "more", *discriminator, batch=8, accumulation=2, epochs=1)):
        assert status == 0, said
    alone(autoencoder(tmp_path / "more", *discriminator, batch=8, accumulation=2))
    alone(autoencoder(tmp_path / "one", *discriminator, batch=8, accumulation=2))
    more, one = (tmp_path / name / "checkpoints" / "few" for name in ("more", "one"))
    near(more / "last_model.safetensors", one / "last_model.safetensors")
