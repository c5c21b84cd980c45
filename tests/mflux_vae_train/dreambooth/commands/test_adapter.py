"""The command `mflux-dreambooth adapter` on the embedded pipelines: results, refusals, and what lies beside a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.weights.formats.files import read_safetensors, write_json, write_safetensors, write_text
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import commands
from mflux_vae_train.dreambooth.adapter_origin import base_model, run_settings
from mflux_vae_train.lora.editing.adapter import open_adapter
from mflux_vae_train.lora.metadata import card
from mflux_vae_train.pipelines import tiny_sd
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline
from tests.mflux_vae_train.lora.editing.random_changes import assert_equal, deltas

Edit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edit(capsys: pytest.CaptureFixture[str]) -> Edit:
    """Arguments -> exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = commands.main(["adapter", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def adapted_networks(rank: int = 2, seed: int = 0) -> dict[str, object]:
    """The UNet and text encoder of `tiny-sd` with random adapters of alpha 3."""
    pipeline = tiny_sd.load()
    networks = {"unet": pipeline.denoiser, **pipeline.text_encoders_to_train()}
    for prefix, network in networks.items():
        lora.add_lora(network, ["*.to_q", "*.ff.net.2"] if prefix == "unet" else ["*.q_proj"], rank=rank, alpha=3.0)
        for number, layer in enumerate(lora.layers(network).values()):
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number + seed))
    return networks


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "cat.safetensors"
    lora.save_adapter(adapted_networks(), path)
    return path


def test_a_converted_file_converts_back(edit: Edit, file: Path, tmp_path: Path) -> None:
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    assert edit("convert", file, "--to", "kohya", "--model", "tiny-sd", "--output", kohya)[0] == 0
    status, out, err = edit("convert", kohya, "--to", "peft", "--model", "tiny-sd", "--output", back)
    assert status == 0 and "rank 2" in out and "warning" not in err
    assert_equal(open_adapter(back).changes, deltas(open_adapter(file).changes))
    metadata = read_safetensors(back)[1]
    assert metadata["ss_base_model_version"] == "sd_v1" and "ss_network_dim" not in metadata
    assert json.loads(metadata["adapter_edit"]) == {"command": "convert", "adapters": ["kohya.safetensors"]}
    status, out, _ = edit("info", kohya, "--model", "tiny-sd", "--json")
    described = json.loads(out)
    assert (described["dialect"], described["fits"], described["layers"]) == ("kohya", True, 14)
    assert described["networks"] == {"te": 2, "unet": 12}
    status, out, _ = edit("info", file, "--model", "tiny")
    assert status == 0 and "does not fit tiny" in out
    assert edit("info", file, "--model", "nothing")[0] == 2


def test_a_sum_with_a_file_of_other_names(edit: Edit, file: Path, tmp_path: Path) -> None:
    other, kohya, target = (tmp_path / f"{name}.safetensors" for name in ("other", "kohya", "sum"))
    lora.save_adapter(adapted_networks(rank=1, seed=50), other)
    assert edit("convert", other, "--to", "kohya", "--model", "tiny-sd", "--output", kohya)[0] == 0
    arguments = ("merge", file, kohya, "--weights", 0.7, -0.5, "--output", target)
    status, _, err = edit(*arguments)
    assert status == 2 and "--model" in err and not target.exists()
    status, out, _ = edit(*arguments, "--model", "tiny-sd")
    assert status == 0 and "14 layers, 14 of them" in out
    one, two = (deltas(open_adapter(each).changes) for each in (file, other))
    assert_equal(open_adapter(target).changes, {path: 0.7 * one[path] - 0.5 * two[path] for path in one})
    assert "error" in edit(*arguments, "--model", "tiny-sd", "--rank", 2, "--overwrite")[1]
    assert {change.rank for _, change in open_adapter(target).layers()} == {2}


def test_an_extracted_adapter_is_the_fused_one(edit: Edit, file: Path, tmp_path: Path) -> None:
    pipeline = tiny_sd.load()
    networks = {"unet": pipeline.denoiser, **pipeline.text_encoders_to_train()}
    lora.load_adapter(networks, file)
    for network in networks.values():
        lora.fuse(network)
    pipeline.denoiser.conv_in.bias = pipeline.denoiser.conv_in.bias * 1.25
    pipeline.save_pretrained(tmp_path / "tuned", "float32")
    target = tmp_path / "extracted.safetensors"
    status, out, err = edit("extract", "tiny-sd", tmp_path / "tuned", "--rank", 2, "--output", target)
    assert status == 0 and "unet.conv_in.bias (by 0.25" in err and out.count("1.0000") == 15
    assert_equal(open_adapter(target).changes, deltas(open_adapter(file).changes))
    status, _, err = edit("extract", "tiny-sd", "tiny-sd", "--rank", 2, "--output", target, "--overwrite")
    assert status == 2 and "equal" in err
    status, _, err = edit("extract", "tiny-sd", "tiny", "--rank", 2, "--output", tmp_path / "no.safetensors")
    assert status == 2 and "transformer" in err


def test_weights_are_compared_in_their_precision_on_every_device(
    edit: Edit, file: Path, tmp_path: Path, gpu_branch: None
) -> None:
    """Not in bfloat16, which would round a small difference away."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd.WEIGHTS, mx.float32)
    layer = pipeline.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight = layer.weight + (expected := 1e-4 * mx.sin(mx.arange(layer.weight.size).reshape(layer.weight.shape)))
    pipeline.save_pretrained(tmp_path / "tuned", "float32")
    target = tmp_path / "extracted.safetensors"
    status, _, _ = edit("extract", "tiny-sd", tmp_path / "tuned", "--rank", 64, "--output", target)
    ((name, change),) = open_adapter(target).layers()
    assert status == 0 and name == "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    np.testing.assert_allclose(change.b @ change.a, expected, atol=1e-6)


def test_a_smaller_file(edit: Edit, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    status, out, _ = edit("resize", file, "--rank", 1, "--scale", 0.5, "--output", target)
    assert status == 0 and "error" in out
    assert {(change.rank, change.scale) for _, change in open_adapter(target).layers()} == {(1, 1.0)}
    assert edit("resize", file, "--scale", -2, "--output", target, "--overwrite")[0] == 0
    expected = {path: -2 * delta for path, delta in deltas(open_adapter(file).changes).items()}
    assert_equal(open_adapter(target).changes, expected)
    assert "warning" in edit("resize", file, "--rank", 9, "--output", target, "--overwrite")[2]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["resize", "FILE"], "--keep"),
        (["resize", "FILE", "--rank", "1", "--keep", "0.5"], "one"),
        (["resize", "FILE", "--rank", "0"], "--rank 0"),
        (["resize", "FILE", "--keep", "1.5"], "--keep"),
        (["resize", "FILE", "--scale", "nan"], "--scale"),
        (["merge", "FILE", "--weights", "1"], "two"),
        (["merge", "FILE", "FILE", "--weights", "1"], "weights"),
        (["merge", "FILE", "FILE", "--weights", "1", "0"], "weights"),
        (["convert", "FILE", "--to", "kohya"], "--model"),
        (["convert", "nothing.safetensors", "--to", "peft"], "nothing"),
        (["extract", "tiny-sd", "nothing", "--rank", "2"], "nothing"),
        (["extract", "tiny-sd", "tiny-sd", "--rank", "2", "--layers", "to_x"], "to_x"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], word: str, edit: Edit, file: Path, tmp_path: Path) -> None:
    given = [str(file) if word == "FILE" else word for word in arguments]
    status, _, err = edit(*given, "--output", tmp_path / "out.safetensors")
    assert status == 2 and word in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_existing_files_and_quantized_models_are_refused(edit: Edit, file: Path, tmp_path: Path) -> None:
    status, _, err = edit("resize", file, "--rank", 1, "--output", file)
    assert status == 2 and "--overwrite" in err
    pipeline = tiny_sd.load()
    quantize(pipeline.denoiser, 8, lambda path: ".attentions." in path)
    pipeline.save_pretrained(tmp_path / "quantized")
    target = tmp_path / "out.safetensors"
    status, _, err = edit("extract", "tiny-sd", tmp_path / "quantized", "--rank", 2, "--output", target)
    assert status == 2 and "quantized" in err


def test_a_run_tells_its_model_and_settings(edit: Edit, file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoint-5" / "pytorch_lora_weights.safetensors"
    tensors, metadata = read_safetensors(file)
    for path in (checkpoint, run / checkpoint.name):
        write_safetensors(path, tensors, metadata)
    write_json(run / "run.json", {})
    write_text(run / "settings.yaml", "model: tiny-sd\nrank: 2\nderived:\n  rank: 8\n  seed: 3\n")
    assert run_settings(checkpoint)["seed"] == 3 and base_model(checkpoint) == "tiny-sd"
    _, out, _ = edit("info", run)
    assert "base model: tiny-sd" in out and "rank: 8" in out and "run/pytorch_lora_weights.safetensors" in out
    assert str(tmp_path) not in out
    assert edit("convert", checkpoint.parent, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")[0] == 0


def test_a_model_card_or_peft_tells_the_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    assert base_model(path) is None
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "owner/of-peft"})
    assert base_model(path) == "owner/of-peft"
    write_text(tmp_path / "README.md", "---\nbase_model: owner/of-card\n---\n\n# A card\n")
    assert base_model(path) == card(path)["base_model"] == "owner/of-card"
    write_text(tmp_path / "README.md", "A text --- with dashes ---\n")
    assert not card(path)
