"""Parts of a FLUX pipeline: read from every layout, quantised, computed again, there when needed, then gone."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import WeightsError
from mflux_vae.networks.layers import Linear
from mflux_vae.pretrained import loading
from mflux_vae.weights.keymaps.rules import from_mlx
from mflux_vae_train import lora
from mflux_vae_train.pipelines import parts, registry
from mflux_vae_train.pipelines.flux1 import keys
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.flux1.prompts import FluxPrompts
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.pipelines.gradient_checkpointing import checkpointed
from mflux_vae_train.pipelines.quantization import QuantizedLinear, quantize
from mflux_vae_train.pipelines.text.t5 import T5Config, T5Encoder
from mflux_vae_train.randomness import Stream, sample_keys
from tests.helpers.memory_order import views
from tests.helpers.peak_memory import peak_of
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config, small_pipeline

PROMPTS = ["a photo of a red star", ""]
KEYS = sample_keys(0, Stream.PREVIEW, 0, range(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flux")
    small_pipeline(place / "parts").save_pretrained(place / "saved", "float32")
    return place / "saved"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights_of(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def picture(pipeline: FluxPipeline) -> np.ndarray:
    conditioning = {name: value[:1] for name, value in pipeline.encode_prompts(PROMPTS).items()}
    return np.array(pipeline.sample(conditioning, size=(32, 32), steps=2, guidance=2.0, key=KEYS))


# layouts


def test_bfl_file_replaces_the_transformer_folder(folder: Path) -> None:
    expected = picture(FluxPipeline.from_pretrained(folder))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    mx.save_safetensors(str(folder / "flux1-schnell.safetensors"), keys.to_bfl(mx.load(str(file))))
    file.unlink()
    np.testing.assert_array_equal(picture(FluxPipeline.from_pretrained(folder)), expected)


def test_bfl_file_is_ignored_beside_a_transformer_folder(folder: Path) -> None:
    (folder / "flux1-schnell.safetensors").write_bytes(b"")
    picture(FluxPipeline.from_pretrained(folder))


def test_missing_tensor_in_a_bfl_file_is_named(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    theirs = keys.to_bfl(mx.load(str(file)))
    del theirs["single_blocks.1.linear1.weight"]
    mx.save_safetensors(str(folder / "flux1-dev.safetensors"), theirs)
    file.unlink()
    with pytest.raises(
        WeightsError, match=r"flux1-dev\.safetensors.*4 missing: single_transformer_blocks\.1\.attn\.to"
    ):
        FluxPipeline.from_pretrained(folder)


def as_mflux(folder: Path) -> None:
    """Rewrites a folder as mflux saves one, linear layers and embeddings in 8 bits where they can be."""
    tables = {"transformer": keys.MFLUX_TRANSFORMER, "text_encoder_2": keys.MFLUX_T5, "text_encoder": (), "vae": ()}
    for part, rules in tables.items():
        (file,) = (folder / part).glob("*.safetensors")
        tensors = from_mlx(mx.load(str(file)), rules)
        if part == "vae":
            turned = {}
            for name, value in tensors.items():
                path, _, kind = name.rpartition(".")
                layer = path.rpartition(".")[2]
                inner = "norm" if layer == "conv_norm_out" else "conv2d" if layer in ("conv_in", "conv_out") else None
                named = f"{path}.{inner}.{kind}" if inner else name
                turned[named] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
            tensors = turned
        smaller = {}
        for name, value in tensors.items():
            path, _, kind = name.rpartition(".")
            if kind == "weight" and value.ndim == 2 and value.shape[1] % 32 == 0:
                packed, scales, biases = mx.quantize(value, 32, 8)
                smaller |= {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
            else:
                smaller[name] = value
        file.unlink()
        mx.save_safetensors(str(folder / part / "0.safetensors"), smaller, {"mflux_version": "0.24.0"})
        index = {"metadata": {"mflux_version": "0.24.0"}, "weight_map": dict.fromkeys(smaller, "0.safetensors")}
        (folder / part / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize("indexed", [True, False])
def test_folder_saved_by_mflux_opens_quantized(folder: Path, indexed: bool) -> None:
    expected = picture(FluxPipeline.from_pretrained(folder))
    as_mflux(folder)
    if not indexed:
        for index in folder.rglob("model.safetensors.index.json"):
            index.unlink()
    pipeline = registry.open_pipeline(str(folder))
    assert isinstance(pipeline, FluxPipeline)
    assert isinstance(pipeline.denoiser.transformer_blocks[0].ff.net[0].proj, nn.QuantizedLinear)
    assert float(np.abs(picture(pipeline) - expected).mean()) < 0.02


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "mflux"])
def test_weights_are_in_memory_order(folder: Path, layout: str) -> None:
    if layout == "bfl":
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        mx.save_safetensors(str(folder / "flux1-schnell.safetensors"), keys.to_bfl(mx.load(str(file))))
        file.unlink()
        loading.convert(folder / "vae", folder / "ae.safetensors", "bfl")
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    elif layout == "mflux":
        as_mflux(folder)
    pipeline = registry.open_pipeline(str(folder))
    assert isinstance(pipeline, FluxPipeline)
    for network in (*(part.get() for part in pipeline.parts.networks.values()), pipeline.vae):
        assert not views(network.parameters())


def test_unknown_folder_error_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"no model_index\.json"):
        registry.open_pipeline(str(tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_round_trip_bitwise(folder: Path, tmp_path: Path, bits: int) -> None:
    first = FluxPipeline.from_pretrained(folder)
    first.quantize(bits)
    first.save_pretrained(tmp_path / "smaller", "float32")
    second = FluxPipeline.from_pretrained(tmp_path / "smaller")
    assert second.denoiser.single_transformer_blocks[1].proj_mlp.bits == bits
    for name in ("transformer", "text_encoder_2"):
        before, after = (weights_of(pipeline.parts.networks[name].get()) for pipeline in (first, second))
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[key], after[key]) for key in before)
    np.testing.assert_array_equal(picture(first), picture(second))


def test_wrong_scales_raise(folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.quantize(8)
    pipeline.save_pretrained(folder, "float32")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: mx.array(np.array(value)) for name, value in mx.load(str(file)).items()}
    tensors["transformer_blocks.0.attn.to_q.scales"] = mx.zeros((32, 5))
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(WeightsError, match="to_q"):
        FluxPipeline.from_pretrained(folder)


# on demand


def held() -> int:
    gc.collect()
    mx.synchronize()  # inputs of the last operation are released when it is done
    mx.clear_cache()
    return mx.get_active_memory()


def test_parts_load_on_demand_and_release_frees_them(folder: Path) -> None:
    start = held()
    pipeline = FluxPipeline.from_pretrained(folder)
    assert held() == start, "opening read weights"
    conditioning = dict(pipeline.encode_prompts(PROMPTS))
    mx.eval(conditioning)
    texts = sum(
        weight.nbytes
        for name in ("text_encoder", "text_encoder_2")
        for weight in weights_of(pipeline.parts.networks[name].get()).values()
    )
    assert held() - start >= texts
    pipeline.release("prompts")
    results = sum(value.nbytes for value in conditioning.values())
    assert held() - start <= 3 * results < texts, "text encoders are still there"

    mx.eval(pipeline.encode_images(mx.zeros((1, 32, 32, 3))))  # kernels make their constants
    pipeline.release("images")
    before = held()
    latents = pipeline.encode_images(mx.zeros((1, 32, 32, 3)))
    mx.eval(latents)
    assert held() > before + 10_000
    pipeline.release("images")
    assert held() - before <= 2 * latents.nbytes, "the autoencoder is still there"  # MLX may reuse a larger buffer

    # what was released comes again, the same
    again = pipeline.encode_prompts(PROMPTS)
    assert all(mx.array_equal(conditioning[name], again[name]) for name in again)


def test_the_empty_prompt_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    conditioning = pipeline.encode_prompts(PROMPTS[:1])
    guided = {"size": (32, 32), "steps": 1, "guidance": 3.0, "key": KEYS}
    expected = pipeline.sample(conditioning, **guided)
    pipeline.release("prompts")
    monkeypatch.setattr(FluxPrompts, "encode", lambda *_: pytest.fail("encoded again"))
    for _ in range(2):
        assert mx.array_equal(pipeline.sample(conditioning, **guided), expected)


def test_fingerprints_do_not_quantize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    plain = pipeline.encoder_fingerprint("prompts")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "quantize", lambda *_: pytest.fail("quantised"))
        pipeline.quantize(4)
        found = pipeline.encoder_fingerprint("prompts")
        other = FluxPipeline.from_pretrained(folder)
        other.quantize(8)
        assert len({plain, found, other.encoder_fingerprint("prompts")}) == 3
    assert isinstance(pipeline.prompts.t5.get().encoder.block[0].layer[1].DenseReluDense.wo, nn.QuantizedLinear)
    assert pipeline.encoder_fingerprint("prompts") == found, "it depends on what is loaded"


def test_saving_does_not_keep_parts_loaded(folder: Path, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(folder)
    transformer = pipeline.denoiser
    pipeline.save_pretrained(tmp_path / "again")
    assert [part.loaded for part in pipeline.parts.networks.values()] == [transformer, None, None]


def test_release_keeps_given_networks(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)
    expected = picture(pipeline)
    pipeline.release("prompts", "images")
    np.testing.assert_array_equal(picture(pipeline), expected)


# quantised bases


def objective(network: FluxTransformer):
    draws = np.random.default_rng(0)
    given = [mx.array(draws.standard_normal(shape).astype(np.float32)) for shape in ((2, 6, 16), (2, 5, 24), (2, 20))]

    def loss(parameters: dict) -> mx.array:
        network.update(parameters)
        out = network(*given, mx.array([0.3, 0.8]), mx.zeros((6, 3)), mx.zeros((5, 3)))
        return mx.square(out - 1).mean()

    return loss


def adapted(network: FluxTransformer, dropout: float = 0.0) -> FluxTransformer:
    lora.add_lora(network, ["*.attn.to_*", "*.ff.net.*", "*.proj_mlp"], rank=4, dropout=dropout)
    for index, layer in enumerate(lora.layers(network).values()):
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(index))
    return network


def slopes(network: FluxTransformer) -> tuple[mx.array, dict[str, mx.array]]:
    trained = network.trainable_parameters()
    value, gradients = mx.value_and_grad(objective(network))(trained)
    network.update(trained)
    return value, dict(tree_flatten(gradients))


def test_adapter_gradients_over_8_bits_match_full_precision() -> None:
    plain, small = (drawn(FluxTransformer(small_config()), 5) for _ in range(2))
    quantize(small, 8, lambda path: "transformer_blocks" in path)
    assert isinstance(small.transformer_blocks[0].norm1.linear, nn.QuantizedLinear)
    (loss, expected), (found_loss, found) = slopes(adapted(plain)), slopes(adapted(small))
    assert float(found_loss) == pytest.approx(float(loss), rel=0.02)
    assert found.keys() == expected.keys() and all("lora" in name for name in found)
    error = sum(float(mx.square(found[name] - expected[name]).sum()) for name in found)
    size = sum(float(mx.square(expected[name]).sum()) for name in found)
    assert (error / size) ** 0.5 < 0.05


def test_layers_without_a_group_size_are_kept() -> None:
    config = T5Config(
        vocab_size=9, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, feed_forward_proj="gated-gelu"
    )
    network = T5Encoder(config)
    quantize(network, 4, lambda path: True)
    kinds = {
        path: type(layer)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.QuantizedLinear)
    }
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo"] is QuantizedLinear
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wi_0"] is Linear


# checkpointed activations


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("mode", ["adapter", "adapter with dropout", "all weights"])
def test_checkpointed_gradients_are_equal(mode: str, bits: int | None) -> None:
    if bits and mode == "all weights":
        pytest.skip("quantised weights are not trained")
    network = drawn(FluxTransformer(small_config(num_layers=2)), 5)
    if bits:
        quantize(network, bits, lambda path: "transformer_blocks" in path)
    if mode != "all weights":
        adapted(network, dropout=0.5 if "dropout" in mode else 0.0)
    rows = sample_keys(0, Stream.LORA_DROPOUT, 0, range(2))
    results = []
    for network.gradient_checkpointing in (False, True):
        trained = network.trainable_parameters()

        def loss(parameters: dict) -> mx.array:
            with lora.dropout_keys(network, rows):
                return objective(network)(parameters)

        value, gradients = mx.value_and_grad(loss)(trained)
        network.update(trained)
        results.append((value, dict(tree_flatten(gradients))))
    (value, expected), (again, found) = results
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_checkpointing_saves_memory() -> None:
    """A stack of twelve blocks: without, the activations of all lie in memory; with, those of one."""
    network = adapted(drawn(FluxTransformer(small_config(num_layers=4, num_single_layers=8)), 5))
    tokens = 256
    given = [mx.random.normal(shape, key=mx.random.key(0)) for shape in ((1, tokens, 16), (1, 64, 24), (1, 20))]
    mx.eval(given, network.parameters())

    def loss(parameters: dict) -> mx.array:
        network.update(parameters)
        return mx.square(network(*given, mx.array([0.5]), mx.zeros((tokens, 3)), mx.zeros((64, 3)))).mean()

    peaks, losses = [], []
    trained = network.trainable_parameters()

    def step() -> tuple[mx.array, dict]:
        value, gradients = mx.value_and_grad(loss)(trained)
        network.update(trained)
        losses.append(value)
        return value, gradients

    for network.gradient_checkpointing in (False, True):
        peaks.append(peak_of(step))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert peaks[1] < 0.4 * peaks[0], peaks


def test_checkpointing_can_be_compiled() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x = mx.random.normal((3, 4), key=mx.random.key(0))

    def loss(parameters: dict, run) -> mx.array:
        block.update(parameters)
        return mx.square(run(block, run(block, x))).sum()

    trained = block.trainable_parameters()
    plain = mx.grad(lambda parameters: loss(parameters, lambda one, value: one(value)))(trained)
    found = mx.compile(mx.grad(lambda parameters: loss(parameters, checkpointed)))(trained)
    for (name, one), (_, other) in zip(tree_flatten(plain), tree_flatten(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=name)
