"""One registry of optimizers for both commands: adding one takes one entry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mflux_vae_train.dreambooth.config import OPTIMIZER_FLAGS
from mflux_vae_train.optimizers.registry import OPTIMIZERS, build, used_by
from mflux_vae_train.pipelines import tiny

EXAMPLE = Path(tiny.__file__).parent / "example"

FAKE = """
import sys
import mlx.core as mx
from mflux_vae_train.optimizers import registry
from mflux_vae_train.optimizers.base import Optimizer

class SignDescent(Optimizer):
    def init_state(self, weights, state): state["updates"] = mx.array(0)
    def step_single(self, gradient, weights, state):
        state["updates"] = state["updates"] + 1
        return weights - self.learning_rate * mx.sign(gradient)

sys.modules["fake"] = sys.modules["__main__"]
registry.OPTIMIZERS["signs"] = registry.Entry(factory="fake:SignDescent", help="the gradient's sign", options=())
"""

DREAMBOOTH = FAKE + "from mflux_vae_train.dreambooth.cli import main; sys.exit(main())"
AUTOENCODER = FAKE + "from mflux_vae.cli import main; sys.exit(main())"


def run(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def test_dreambooth_offers_and_trains_with_an_added_optimizer(tmp_path: Path) -> None:
    assert "signs" in run(DREAMBOOTH, "--help-all").stdout
    done = run(
        DREAMBOOTH, "--model", "tiny", "--optimizer", "signs", "--instance_data_dir", EXAMPLE,
        "--instance_prompt", "a photo of xyz star", "--max_train_steps", 2, "--lr_warmup_steps", 0,
        "--prior_preservation", "none", "--num_validation_images", 0, "--adam_beta1", 0.5,
        "--resolution", 32, "--gradient_accumulation_steps", 1, "--output_dir", tmp_path,
    )  # fmt: skip
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert "--adam_beta1 has no effect" in done.stderr, "the entry's options decide what is ignored"


def test_the_autoencoder_trainer_offers_and_trains_with_an_added_optimizer(tmp_path: Path) -> None:
    assert "signs" in run(AUTOENCODER, "train", "--help-all").stdout
    run(
        AUTOENCODER, "train", "--optimizer", "signs", "--network", "plain", "--hidden_dims", 8, 8, "--latent_dim", 2,
        "--data_count", 16, "--image_size", 8, "--batch_size", 8, "--num_epochs", 1, "--learning_rate", 1e-4,
        "--experiment_name", "signs", "--output_dir", tmp_path,
    )  # fmt: skip
    assert (tmp_path / "checkpoints" / "signs" / "last_model.safetensors").is_file()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_option_of_an_entry_arrives(name: str) -> None:
    entry = OPTIMIZERS[name]
    values = {option: 0.25 for option in OPTIMIZER_FLAGS.values()}
    optimizer = build(name, **values)
    holders = [vars(one) for one in getattr(optimizer, "optimizers", [optimizer])]
    for option in entry.options:
        assert any(holder.get(option) == 0.25 or holder.get("decay") == 0.25 for holder in holders), option


def test_flags_that_an_optimizer_ignores_follow_from_its_options() -> None:
    used = used_by({"a": "beta1", "b": "weight_decay"}, ("adamw", "adafactor"))
    assert used == {"a": ("adamw",), "b": ("adamw", "adafactor")}
