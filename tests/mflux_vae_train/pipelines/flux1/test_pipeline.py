"""The FLUX pipeline at a small size: its contract, its files, its noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae_train.pipelines.flux1.packing import image_ids, pack, unpack
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.randomness import Stream, sample_keys
from tests.contracts.pipeline_contract import PipelineContract
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, TEXT_TOKENS, small_pipeline

PROMPTS = ["a photo of a red star", "a blue dog", "a circle on a star"]
WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> FluxPipeline:
    return small_pipeline(tmp_path_factory.mktemp("schnell"), recommended=RECOMMENDED)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> FluxPipeline:
    return small_pipeline(tmp_path_factory.mktemp("dev"), guidance_embeds=True)


@pytest.fixture
def folder(schnell: FluxPipeline, tmp_path: Path) -> Path:
    schnell.save_pretrained(tmp_path / "saved", "float32")
    return tmp_path / "saved"


def weights_of(pipeline: FluxPipeline, part: str) -> dict[str, mx.array]:
    network = pipeline.vae.network if part == "vae" else pipeline.parts.networks[part].get()
    return dict(tree_flatten(network.parameters()))


def keys(*samples: int) -> mx.array:
    return sample_keys(0, Stream.PREVIEW, 0, samples)


class TestContract(PipelineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls, schnell: FluxPipeline) -> FluxPipeline:
        return schnell


class TestContractWithGuidanceEmbedding(PipelineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls, tmp_path_factory: pytest.TempPathFactory) -> FluxPipeline:
        return small_pipeline(tmp_path_factory.mktemp("guided"), True, recommended=RECOMMENDED)


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 2)])
def test_packing_round_trip(size: tuple[int, int]) -> None:
    latents = mx.random.normal((2, *size, 3), key=mx.random.key(0))
    tokens = pack(latents)
    assert tokens.shape == (2, size[0] * size[1] // 4, 12)
    assert mx.array_equal(unpack(tokens, *size), latents)


def test_packed_channel_order() -> None:
    """Token r * (W/2) + s holds channel c of pixel (2 r + i, 2 s + j) at c * 4 + i * 2 + j."""
    latents = mx.random.normal((1, 4, 6, 5), key=mx.random.key(0))
    tokens = pack(latents)
    for r, s, c, i, j in ((0, 0, 0, 0, 1), (1, 2, 4, 1, 0), (1, 0, 3, 1, 1), (0, 1, 2, 0, 0)):
        assert tokens[0, r * 3 + s, c * 4 + i * 2 + j] == latents[0, 2 * r + i, 2 * s + j, c]
    assert image_ids(4, 6).tolist() == [[0, r, s] for r in range(2) for s in range(3)]


def test_packing_odd_latents_raises() -> None:
    with pytest.raises(ImageError, match="multiples of 16"):
        pack(mx.zeros((1, 3, 4, 2)))


def test_guidance_changes_the_image(schnell: FluxPipeline, dev: FluxPipeline) -> None:
    for pipeline in (schnell, dev):
        conditioning = pipeline.encode_prompts(PROMPTS[:1])
        one, two, again = (
            pipeline.sample(conditioning, size=(32, 16), steps=2, guidance=guidance, key=keys(1))
            for guidance in (1.0, 3.0, 3.0)
        )
        assert mx.array_equal(two, again)
        assert float(mx.abs(one - two).max()) > 1e-3


def test_guidance_has_no_effect_on_the_empty_prompt(schnell: FluxPipeline) -> None:
    """Guided towards the empty prompt itself, guidance changes nothing."""
    empty = schnell.encode_prompts([""])
    plain, guided = (
        schnell.sample(empty, size=(16, 32), steps=3, guidance=guidance, key=keys(1)) for guidance in (1.0, 5.0)
    )
    np.testing.assert_allclose(plain, guided, atol=1e-4)


def test_given_noise_overrides_the_keys(schnell: FluxPipeline) -> None:
    conditioning = schnell.encode_prompts(PROMPTS[:2])
    noise = mx.random.normal((2, 4, 4, 4), key=mx.random.key(3))
    first, second = (
        schnell.sample(conditioning, size=(32, 32), steps=2, guidance=1.0, key=key, latents=noise)
        for key in (keys(0, 1), keys(5, 6))
    )
    assert mx.array_equal(first, second)


@pytest.mark.parametrize("size", [(24, 32), (32, 0), (8, 8)])
def test_unsupported_image_sizes_raise(schnell: FluxPipeline, size: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match="multiples of 16"):
        schnell.sample(schnell.encode_prompts([""]), size=size, steps=1, guidance=1.0, key=keys(0))


def test_decoding_in_batches_does_not_change_images(schnell: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"size": (32, 32), "steps": 1, "guidance": 1.0, "key": keys(0, 1, 2)}
    conditioning = schnell.encode_prompts(PROMPTS)
    whole = schnell.sample(conditioning, **arguments)
    monkeypatch.setattr("mflux_vae_train.pipelines.decoding.DECODED_AT_ONCE", 2 * 32 * 32)
    np.testing.assert_allclose(schnell.sample(conditioning, **arguments), whole, atol=1e-5)


def test_loss_is_the_velocity_error(schnell: FluxPipeline) -> None:
    """A denoiser that says nothing errs by the mean square of noise - latents: 1 for zero latents."""
    spoken = schnell.denoiser.proj_out.parameters()
    schnell.denoiser.proj_out.update({name: mx.zeros_like(value) for name, value in spoken.items()})
    try:
        conditioning = schnell.encode_prompts([""] * 16)
        latents = mx.zeros((16, 8, 8, 4))
        loss = schnell.loss(latents, conditioning, key=keys(*range(16)), guidance=1.0)
    finally:
        schnell.denoiser.proj_out.update(spoken)
    assert float(loss.mean()) == pytest.approx(1, abs=0.1)


def test_prompt_length_is_limited_by_tokenizer_and_model(
    schnell: FluxPipeline, tmp_path: Path, dev: FluxPipeline
) -> None:
    assert schnell.prompts.tokens == TEXT_TOKENS
    assert schnell.encode_prompts(PROMPTS)["prompt_embeds"].shape == (3, TEXT_TOKENS, 24)
    for embeds, longest in ((False, 256), (True, 512)):
        pipeline = small_pipeline(tmp_path, embeds)
        settings = tmp_path / "tokenizer_2" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 10_000}))
        tokenizers = {**pipeline.parts.tokenizers, "tokenizer_2": LazyTokenizer(tmp_path / "tokenizer_2")}
        parts = replace(pipeline.parts, tokenizers=tokenizers)
        assert FluxPipeline(parts, pipeline.configs).prompts.tokens == longest


def test_prompt_limit_also_shortens_the_empty_prompt(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)
    whole, whole_id = pipeline.encode_prompts([*PROMPTS, ""]), pipeline.encoder_fingerprint("prompts")
    pipeline.prompt_limit = 3
    cut = pipeline.encode_prompts(PROMPTS)
    assert cut["prompt_embeds"].shape == (3, 3, whole["prompt_embeds"].shape[-1])
    assert pipeline.encoder_fingerprint("prompts") != whole_id  # what was kept of whole ones is of no use
    pictures = pipeline.sample(cut, size=(32, 32), steps=1, guidance=2.0, key=keys(0, 1, 2))
    assert pictures.shape == (3, 32, 32, 3)  # guidance had an empty prompt of that length
    pipeline.prompt_limit = 10_000
    assert pipeline.encode_prompts(PROMPTS)["prompt_embeds"].shape == whole["prompt_embeds"][:3].shape


def test_recommended_settings_of_published_models(tmp_path: Path, dev: FluxPipeline) -> None:
    schnell = small_pipeline(tmp_path)
    recommended = schnell.recommended
    assert (recommended.guidance, recommended.steps, recommended.weighting_scheme) == (1.0, 4, "schnell")
    assert dev.recommended.weighting_scheme == "flux_shift"


def test_saved_pipeline_is_bitwise_equal(schnell: FluxPipeline, folder: Path) -> None:
    opened = FluxPipeline.from_pretrained(folder)
    assert opened.recommended == RECOMMENDED
    assert (opened.schedule, opened.name) == (schnell.schedule, "saved")
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        before, after = (weights_of(p, name) for p in (schnell, opened))
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[key], after[key]) for key in before), name
    arguments = {"size": (32, 16), "steps": 2, "guidance": 2.5, "key": keys(1, 2, 3)}
    first, second = (p.sample(p.encode_prompts(PROMPTS), **arguments) for p in (schnell, opened))
    assert mx.array_equal(first, second)


def test_half_precision_files_are_half_as_large(schnell: FluxPipeline, folder: Path, tmp_path: Path) -> None:
    schnell.save_pretrained(tmp_path / "half")
    for part, stem in {**WEIGHTS, "vae": "diffusion_pytorch_model"}.items():
        full, half = (mx.load(str(f / part / f"{stem}.safetensors")) for f in (folder, tmp_path / "half"))
        assert {tensor.dtype for tensor in half.values()} == {mx.float16}
        assert all(mx.array_equal(full[name].astype(mx.float16), half[name]) for name in full)
    assert FluxPipeline.from_pretrained(tmp_path / "half").dtype == mx.float32
    with pytest.raises(SettingsError, match="float16"):
        schnell.save_pretrained(tmp_path / "other", "int8")


@pytest.mark.usefixtures("gpu_branch")
def test_gpu_computes_in_bfloat16_and_returns_float32(schnell: FluxPipeline, folder: Path, tmp_path: Path) -> None:
    opened = FluxPipeline.from_pretrained(folder)
    assert opened.dtype == mx.bfloat16
    assert opened.vae.network.encoder.conv_in.weight.dtype == mx.float32
    narrow = FluxPipeline.from_pretrained(folder, mx.bfloat16)
    assert narrow.vae.network.encoder.conv_in.weight.dtype == mx.bfloat16
    opened.save_pretrained(tmp_path / "saved")
    stored = mx.load(str(tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors"))
    assert all(mx.array_equal(stored[name], array) for name, array in tree_flatten(opened.denoiser.parameters()))
    arguments = {"size": (32, 16), "steps": 2, "guidance": 1.5, "key": keys(1, 2, 3)}
    images, exact = (p.sample(p.encode_prompts(PROMPTS), **arguments) for p in (opened, schnell))
    latents = opened.encode_images(exact)
    loss = opened.loss(latents, opened.encode_prompts(PROMPTS), key=keys(1, 2, 3), guidance=1.0)
    assert images.dtype == latents.dtype == loss.dtype == mx.float32
    assert float(mx.abs(images - exact).mean()) < 0.05


def test_saving_onto_the_source_folder_keeps_the_tokenizers(folder: Path) -> None:
    opened = FluxPipeline.from_pretrained(folder)
    opened.save_pretrained(folder, "float32")
    again = FluxPipeline.from_pretrained(folder)
    assert mx.array_equal(*(p.parts.tokenizers["tokenizer_2"].get().encode(PROMPTS) for p in (again, opened)))
    assert not list(folder.rglob(".*"))


def test_sharded_weights_open(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before = dict(tree_flatten(FluxPipeline.from_pretrained(folder).denoiser.parameters()))
    path.unlink()
    shards = [f"diffusion_pytorch_model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    weight_map = {name: shards[index % 2] for index, name in enumerate(before)}
    for shard in shards:
        tensors = {name: before[name] for name in before if weight_map[name] == shard}
        mx.save_safetensors(str(path.with_name(shard)), tensors)
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": weight_map}))
    after = dict(tree_flatten(FluxPipeline.from_pretrained(folder).denoiser.parameters()))
    assert all(mx.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("part", WEIGHTS)
def test_wrong_keys_raise_one_error_that_lists_them(folder: Path, part: str) -> None:
    path = folder / part / f"{WEIGHTS[part]}.safetensors"
    tensors = mx.load(str(path))
    mx.eval(tensors)  # before their file is overwritten
    lost, renamed, bent = sorted(tensors)[:3]
    del tensors[lost]
    tensors["stray.weight"] = tensors.pop(renamed)
    tensors[bent] = mx.zeros((3, 3, 3))
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(WeightsError) as caught:
        FluxPipeline.from_pretrained(folder)
    for text in (str(folder / part), lost, renamed, "stray.weight", f"{bent} is (3, 3, 3)"):
        assert text in str(caught.value)


def test_encoder_fingerprints_depend_on_weights_and_files(schnell: FluxPipeline, folder: Path, tmp_path: Path) -> None:
    def identities(one: FluxPipeline) -> tuple[str, str]:
        return one.encoder_fingerprint("images"), one.encoder_fingerprint("prompts")

    mine = identities(schnell)
    assert identities(FluxPipeline.from_pretrained(folder)) == mine
    changed = FluxPipeline.from_pretrained(folder)
    changed.vae.network.decoder.conv_in.bias += 1
    assert identities(changed)[0] != mine[0] and identities(changed)[1] == mine[1]
    changed.quantize(4)
    assert identities(changed)[1] != mine[1]
    (folder / "tokenizer" / "more.txt").write_text("words")
    assert identities(FluxPipeline.from_pretrained(folder))[1] != mine[1]


def test_missing_files_and_other_pipelines_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        FluxPipeline.from_pretrained(tmp_path)
    (folder / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(WeightsError, match="text_encoder_2"):
        FluxPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(WeightsError, match="StableDiffusionPipeline"):
        FluxPipeline.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"weighting_scheme": "magic"}, {"unknown": 1}])
def test_invalid_recommended_json_raises(folder: Path, change: dict) -> None:
    path = folder / "recommended.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((SettingsError, WeightsError), match=r"recommended\.json"):
        FluxPipeline.from_pretrained(folder)


def test_mismatched_autoencoder_raises(tmp_path):
    small_pipeline(tmp_path / "parts").save_pretrained(tmp_path / "saved")
    other = AutoencoderKLConfig(latent_channels=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    VAE(network=AutoencoderKL(other)).save_pretrained(tmp_path / "saved" / "vae")
    with pytest.raises(WeightsError, match="channels"):
        FluxPipeline.from_pretrained(tmp_path / "saved")
