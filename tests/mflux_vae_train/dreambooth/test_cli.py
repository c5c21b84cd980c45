"""The command line: output, exit status, start-up time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from mflux_vae.errors import TrainingError
from mflux_vae.runtime import device
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.dreambooth import cli
from mflux_vae_train.dreambooth import train as train_module
from mflux_vae_train.monitoring import trackers
from mflux_vae_train.pipelines import registry
from tests.contracts.fake import FakePipeline
from tests.helpers.program import answered


@pytest.fixture
def run(instance_dir, tmp_path, monkeypatch, capsys):
    """Run the command on the fake pipeline; returns exit status, standard output and standard error."""
    monkeypatch.setattr(registry, "open_pipeline", lambda model, **_: FakePipeline())

    def main(*flags: str, instance=instance_dir, prompt="a photo of sks dog"):
        status = cli.main(
            [
                "--model=fake",
                f"--instance_data_dir={instance}",
                f"--instance_prompt={prompt}",
                f"--output_dir={tmp_path / 'out'}",
                "--max_train_steps=2",
                "--num_class_images=2",
                "--num_validation_images=1",
                *flags,
            ]
        )
        return status, *capsys.readouterr()

    return main


def test_trains_and_logs_the_settings(run, tmp_path):
    status, out, err = run()
    assert status == 0, err
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert "5 instance images" in out and "class prompt: 'a photo of a dog'" in out and "saved" in out
    assert run()[1].startswith("already complete")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instance_data_dir=nowhere"], "nowhere does not exist"),
        (["--learning_rte=1"], "did you mean --learning_rate?"),
        (["--rank=many"], "--rank is 'many'"),
        (["--resolution=18"], "a multiple of 4"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--clip_skip=1"], "--clip_skip: pipeline fake does not offer it"),
        (["--max_sequence_length=77"], "--max_sequence_length: pipeline fake does not offer it"),
        (["--with_prior_preservation", "--instance_prompt=a photo of xyz"], "needs --class_prompt"),
    ],
)
def test_bad_input_prints_one_line_and_exits_2(run, tmp_path, flags, message):
    status, _, err = run(*flags)
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("mflux-train-dreambooth: error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_files_are_checked_before_a_pipeline_is_opened(run, monkeypatch, instance_dir):
    def opens(model, **_):
        raise AssertionError("the pipeline was opened")

    monkeypatch.setattr(registry, "open_pipeline", opens)
    (instance_dir / "picture-3.png").write_bytes(b"not a picture")
    status, _, err = run()
    assert status == 2 and "picture-3.png" in err


def test_an_unknown_pipeline_is_bad_input(run, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [])
    status, _, err = run("--model=tinny")
    assert status == 2 and "no pipeline or folder 'tinny'" in err


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (TrainingError("it broke"), 1, "error: it broke"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            Interrupted(signal.SIGTERM, 3, saved=True),
            143,
            "interrupted by SIGTERM after update 3; a checkpoint was saved; the same command resumes",
        ),
    ],
)
def test_exit_codes(run, monkeypatch, error, expected, words):
    def fails(self, settings):
        raise error

    monkeypatch.setattr(train_module.DreamBooth, "train", fails)
    status, _, err = run()
    (line,) = err.splitlines()
    assert status == expected and line.startswith(f"mflux-train-dreambooth: {words}")


def test_warnings_print_one_line(run, monkeypatch):
    def opens(model, **_):
        warnings.warn("a plugin is broken", stacklevel=1)
        return FakePipeline()

    monkeypatch.setattr(registry, "open_pipeline", opens)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run("--dry_run")
    assert status == 0 and "warning: a plugin is broken\n" in err


@pytest.mark.skipif(sys.platform != "linux", reason="a fast BLAS is opened on Linux only")
def test_a_missing_blas_prints_one_line():
    code = "import sys; from mflux_vae_train.dreambooth import cli; sys.exit(cli.main(['--no_such_flag']))"
    environment = {**os.environ, "MFLUX_VAE_BLAS": "none"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    *before, mistake = result.stderr.splitlines()
    assert result.returncode == 2 and "unknown flag --no_such_flag" in mistake
    assert len(before) == (1 if device.is_cpu() else 0)  # CUDA needs none
    assert all(line.startswith("warning: MLX has no fast BLAS") for line in before)


def test_a_dry_run_writes_nothing(run, tmp_path):
    status, out, _ = run("--dry_run")
    assert status == 0 and "nothing was written" in out
    assert not (tmp_path / "out").exists()


def test_settings_written_by_a_run_are_a_config(run, tmp_path, capsys):
    assert run()[0] == 0
    assert cli.main([f"--config={tmp_path / 'out' / 'settings.yaml'}"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from mflux_vae_train.dreambooth.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'transformers', 'torch', 'PIL', 'mlx_lm'} & sys.modules.keys()))"
    )
    output, seconds = answered([sys.executable, "-c", code])
    assert "--instance_prompt" in output and "Installed pipelines" in output
    assert output.splitlines()[-1] == "[]"
    assert seconds < 0.5


SLOW = """
import sys
import mflux_vae
from mflux_vae_train.monitoring import trackers
from mflux_vae_train.dreambooth import cli
from mflux_vae_train.pipelines import registry
from tests.contracts.fake import FakePipeline
registry.open_pipeline = lambda model, **_: FakePipeline()
sys.exit(cli.main())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_saves_a_checkpoint(instance_dir, tmp_path):
    out = tmp_path / "out"
    flags = ["--model=fake", f"--instance_data_dir={instance_dir}", "--instance_prompt=a photo of sks dog"]
    flags += [f"--output_dir={out}", "--max_train_steps=1000000", "--num_class_images=1"]
    flags += ["--checkpointing_steps=1000000"]  # none before the signal
    process = subprocess.Popen([sys.executable, "-c", SLOW, *flags], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600  # a busy machine
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "checkpoint" in err.splitlines()[-1]
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_a_missing_tracker_is_refused_before_a_pipeline_is_opened(run, monkeypatch, tmp_path):
    def opens(model, **_):
        raise AssertionError("the pipeline was opened")

    monkeypatch.setattr(registry, "open_pipeline", opens)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    status, _, err = run("--report_to=wandb")
    assert status == 2 and "--report_to wandb" in err and "pip install" in err
    assert not (tmp_path / "out").exists()


def test_ignored_flags_are_logged_and_the_run_continues(run):
    status, _, err = run("--dry_run", "--allow_tf32", "--local_rank", "0", "--mixed-precision=bf16")
    assert status == 0
    ignored = [line.split(": ")[1] for line in err.splitlines() if "has no effect" in line]
    assert ignored == [f"--{name} has no effect" for name in ("allow_tf32", "local_rank", "mixed_precision")]


def test_a_file_in_place_of_a_folder_is_refused_before_the_run(instance_dir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    given = ["--model=tiny", f"--instance_data_dir={instance_dir}", "--instance_prompt=a sks dog", "--dry_run"]
    assert cli.main([*given, f"--encodings_dir={file}", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "--encodings_dir" in capsys.readouterr().err and not (tmp_path / "out").exists()
