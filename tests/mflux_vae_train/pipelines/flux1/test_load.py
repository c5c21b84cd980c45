"""Published models, repositories and revisions: what is asked of the hub, when, and what is said where it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import errors

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.pipelines import flux1, registry
from mflux_vae_train.pipelines.flow.files import read_configs
from mflux_vae_train.pipelines.flux1 import keys
from mflux_vae_train.pipelines.flux1.configs import PUBLISHED
from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.pipelines.footprint import Workload
from mflux_vae_train.pipelines.loading.snapshot import SMALL_FILES, weight_files
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, small_pipeline


class Hub:
    """Stands in for `snapshot_download`: notes what is asked, and answers with a folder or an error."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, repository: str, *, allow_patterns: list[str], local_files_only: bool = False, **rest) -> str:
        if not local_files_only:
            self.asked.append((repository, rest.get("revision"), allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def answering(answer: Path | Exception) -> Hub:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made := Hub(answer))
        return made

    return answering


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("repository")
    small_pipeline(place / "parts").save_pretrained(place / "saved", "float32")
    return place / "saved"


@pytest.mark.parametrize(("name", "guidance"), [("schnell", 1.0), ("dev", 3.5)])
def test_published_models_open_without_the_hub(hub, name: str, guidance: float) -> None:
    asked = hub(AssertionError("the hub was asked")).asked
    pipeline = registry.open_pipeline(name)
    assert (pipeline.name, pipeline.recommended.guidance) == (name, guidance)
    assert not pipeline._snapshot.is_cached()
    layers = dict(pipeline.skeleton().named_modules())
    assert layers["single_transformer_blocks.37.proj_out"].weight.shape == (3072, 5 * 3072)
    assert not asked and mx.get_active_memory() < 1 << 30


def test_first_part_downloads_all_parts(hub, folder: Path) -> None:
    asked = hub(folder).asked
    pipeline = flux1.load("dev")
    with pytest.raises(WeightsError, match="text_encoder"):  # the repository of this test is a small one
        pipeline.prompts.clip.get()
    with pytest.raises(WeightsError, match="transformer"):
        _ = pipeline.denoiser
    assert [(repository, revision) for repository, revision, _ in asked] == [("black-forest-labs/FLUX.1-dev", None)]
    assert pipeline._snapshot.is_cached()


def test_repository_downloads_its_configs_first(hub, folder: Path) -> None:
    asked = hub(folder).asked
    pipeline = registry.open_pipeline("owner/name", revision="main")
    small = [pattern for _, _, wanted in asked for pattern in wanted]
    assert not any(pattern.endswith("safetensors") for pattern in small)
    assert pipeline.encode_prompts(["a dog"])["pooled"].shape == (1, 20)
    assert {(repository, revision) for repository, revision, _ in asked} == {("owner/name", "main")}
    assert asked[-1][2] == [*SMALL_FILES, *weight_files(FAMILY.stems, None)]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_no_weights_are_downloaded_twice(variant: str | None) -> None:
    """Of everything that such repositories hold."""
    stems = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model"}
    shards = [f"-0000{number}-of-00003" for number in (1, 2, 3)]
    files = ["flux1-schnell.safetensors", "ae.safetensors", "LICENSE.md", "schnell_grid.jpeg", "model_index.json"]
    for part, stem in stems.items():
        files += [f"{part}/{stem}{middle}{shard}.safetensors" for middle in ("", ".fp16") for shard in shards]
        files += [f"{part}/{stem}.fp16.safetensors", f"{part}/{stem}.safetensors", f"{part}/{stem}.bin"]
        files += [f"{part}/config.json", f"{part}/{stem}.safetensors.index.json"]
    asked = set(
        huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=[*SMALL_FILES, *weight_files(FAMILY.stems, variant)]
        )
    )
    middle = "" if variant is None else f".{variant}"
    weights = {file for file in asked if file.endswith(".safetensors")}
    assert weights == {
        f"{part}/{stem}{middle}{shard}.safetensors" for part, stem in stems.items() for shard in ("", *shards)
    }
    assert {"model_index.json", "transformer/config.json"} <= asked
    assert not {"LICENSE.md", "transformer/diffusion_pytorch_model.bin"} & asked


def http(kind: type[Exception]) -> Exception:
    return kind("Client error 403\nmore", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (http(errors.GatedRepoError), "hf auth login"),
        (http(errors.RepositoryNotFoundError), "repository"),
        (http(errors.RevisionNotFoundError), "revision"),
        (errors.LocalEntryNotFoundError("x"), "cache"),
        (errors.OfflineModeIsEnabled("x"), "cache"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("of some other library\nmore"), "of some other library"),
    ],
)
def test_download_errors_are_one_line(hub, error: Exception, word: str) -> None:
    hub(error)
    pipeline = flux1.load("dev")
    with pytest.raises(WeightsError, match=word) as caught:
        pipeline.encode_prompts(["a dog"])
    assert "\n" not in str(caught.value)


def test_usual_guidance_round_trip(tmp_path: Path) -> None:
    usual = replace(RECOMMENDED, usual_guidance=(0.5, 2.0))
    small_pipeline(tmp_path / "parts", recommended=usual).save_pretrained(tmp_path / "saved")
    assert flux1.load(str(tmp_path / "saved")).recommended == usual
    file = tmp_path / "saved" / "recommended.json"
    for wrong in ([1.0], [2.0, 1.0], ["a", "b"], 3.0):
        file.write_text(json.dumps({**json.loads(file.read_text()), "usual_guidance": wrong}))
        with pytest.raises((SettingsError, WeightsError), match=r"recommended\.json"):
            flux1.load(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"in_channels": 64}),
        ("transformer", {"joint_attention_dim": 32}),
        ("text_encoder_2", {"d_model": 32}),
    ],
)
def test_parts_of_different_models_raise(folder: Path, tmp_path: Path, part: str, changes: dict[str, int]) -> None:
    """Before any weights are read."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(WeightsError, match="together"):
        read_configs(FAMILY, tmp_path)


def test_revision_of_a_folder_raises(folder: Path) -> None:
    with pytest.raises(SettingsError, match="--revision"):
        registry.open_pipeline(str(folder), revision="v1")


def test_repository_of_another_pipeline_raises(hub, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    hub(tmp_path)
    with pytest.raises(SettingsError, match="OtherPipeline"):
        registry.open_pipeline("owner/name")


def test_empty_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=str(tmp_path)):
        flux1.load(str(tmp_path))


def test_variant_selects_the_weights(folder: Path, tmp_path: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        name = file.name.replace(".safetensors", ".bf16.safetensors")
        copy = tmp_path / file.relative_to(folder).with_name(name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match="weights"):
        flux1.load(str(tmp_path))
    opened, plain = registry.open_pipeline(str(tmp_path), variant="bf16"), flux1.load(str(folder))
    assert mx.array_equal(opened.denoiser.proj_out.weight, plain.denoiser.proj_out.weight)


@pytest.mark.parametrize(("embeds", "repository"), [(False, "FLUX.1-schnell"), (True, "FLUX.1-dev")])
@pytest.mark.parametrize("naming", ["bfl", "comfyui", "diffusers"])
def test_transformer_file_uses_parts_of_the_published_model(
    hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embeds: bool, repository: str, naming: str
) -> None:
    whole = small_pipeline(tmp_path / "parts", guidance_embeds=embeds)
    whole.save_pretrained(tmp_path / "saved", "float32")
    monkeypatch.setitem(PUBLISHED, f"black-forest-labs/{repository}", read_configs(FAMILY, tmp_path / "saved"))
    small = whole.denoiser.config  # a file does not say how wide its blocks are, as they all are alike
    monkeypatch.setattr("mflux_vae_train.pipelines.flux1.configs.FluxTransformerConfig", partial(replace, small))
    tensors = mx.load(str(tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"))
    if naming != "diffusers":
        tensors = keys.to_bfl(tensors)
    if naming == "comfyui":
        tensors = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    mx.save_safetensors(str(tmp_path / "mine.safetensors"), tensors)
    asked = hub(AssertionError("the hub was asked")).asked

    pipeline = registry.open_pipeline(str(tmp_path / "mine.safetensors"))
    assert (pipeline.name, pipeline.base_model) == ("mine", None)
    assert mx.array_equal(pipeline.denoiser.proj_out.weight, whole.denoiser.proj_out.weight)
    assert not asked and not pipeline._snapshot.is_cached()
    told = pipeline.footprint(Workload(resolution=32, trained=1))
    assert 0 < told.download < 2 * sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*.safetensors"))

    asked = hub(tmp_path / "saved").asked
    expected = whole.encode_prompts(["a photo of a dog"])
    assert mx.array_equal(pipeline.encode_prompts(["a photo of a dog"])["pooled"], expected["pooled"])
    assert [name for name, _, _ in asked] == [f"black-forest-labs/{repository}"]
    assert not any(name.startswith("transformer/") and "safetensors" in name for name in asked[0][2])


@pytest.mark.parametrize("kind", ["an autoencoder", "no safetensors", "an adapter", "FLUX.2"])
def test_other_files_raise_one_line(folder: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.safetensors"
    if kind == "an autoencoder":
        file.write_bytes((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    elif kind == "an adapter":
        mx.save_safetensors(str(file), {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": mx.zeros((2, 2))})
    elif kind == "FLUX.2":
        names = ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "double_stream_modulation_img.lin"]
        mx.save_safetensors(str(file), {f"{name}.weight": mx.zeros((2, 2)) for name in names})
    else:
        file.write_text("no safetensors")
    with pytest.raises(SettingsError, match=r"mine\.safetensors"):
        registry.open_pipeline(str(file))
    with pytest.raises(SettingsError, match="--revision"):
        registry.open_pipeline(str(file), revision="main")


def test_encoders_that_the_hub_lists_twice_are_downloaded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling, changed = tmp_path / "sibling", set()
    shutil.copytree(folder, sibling)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        for file in (sibling / part).glob("*.safetensors"):
            file.unlink()

    def listing(self, repository: str, **_) -> SimpleNamespace:
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        hashes = {name: f"{repository} {name}" if name in changed else name for name in names}
        files = [SimpleNamespace(rfilename=name, lfs=None, blob_id=found) for name, found in hashes.items()]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listing)
    places = {"owner/base": folder, "owner/sibling": sibling}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(places[repository]))
    trained, drawing = (flux1.load(name) for name in places)
    for use in ("images", "prompts", "prompts"):
        assert drawing.encodes_as(trained, use)
        drawing.share_encoders(trained, use)
    assert drawing._snapshot.parts == ["transformer"] and drawing._snapshot.is_cached()
    changed |= {"text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    other = flux1.load("owner/sibling")
    for use in ("images", "prompts"):
        with pytest.raises(WeightsError):  # it reads the weights to compare them
            other.encodes_as(trained, use)


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-schnell", "Black-Forest-Labs/flux.1-DEV"])
def test_published_repositories_need_no_hub_for_an_estimate(hub, name: str) -> None:
    hub(AssertionError("the hub was asked"))
    pipeline = registry.open_pipeline(name)
    assert pipeline.name == name and pipeline.base_model.lower() == name.lower()
    estimate = pipeline.footprint(Workload(resolution=512, trained=1))
    assert ("licence" in (estimate.access or "")) == name.endswith("DEV") and estimate.download > 3e10
