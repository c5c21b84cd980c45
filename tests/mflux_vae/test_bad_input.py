"""Bad and odd input through the command line: each kind ends with one line that names the file, or is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mflux_vae import VAE, cli
from mflux_vae.cli import latent_file
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae.weights.keymaps.diffusers import STEM
from tests.mflux_vae.odd_images import PICTURES
from tests.mflux_vae.small_models import small_kl
from tests.mflux_vae.weights.torch_writer import PROTOCOL, call, dump, name, write_old, write_zip

Make = Callable[[Path], Path]
"""From a folder with a good model to the source to open."""

WEIGHTS = f"{STEM}.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    VAE(network=small_kl()).save_pretrained(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], arguments: list[object], *words: str) -> None:
    """One line on standard error that says what is wrong, exit status 2, and nothing else."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("mflux-vae: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


# pictures


@pytest.mark.parametrize("picture", PICTURES)
def test_pictures(
    picture: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    monkeypatch.setattr(VAE, "encode", lambda vae, image, **_: shapes.append(image.shape) or mx.zeros((1, 4, 3, 5)))
    path, file = tmp_path / picture, tmp_path / "latents.safetensors"
    odd = PICTURES[picture]
    odd.write(path)
    command = ["encode", path, "--model", model, "--output", file]
    if path.is_dir():
        return refused(capsys, command, f"{path} has no images")
    if odd.error:
        refused(capsys, command, str(path), odd.error)
        assert not file.exists()
        return
    assert cli.main([str(argument) for argument in command]) == 0, capsys.readouterr().err
    assert shapes == [(1, 3, *odd.size)] and latent_file.read(file)[0][picture].size == odd.size


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (24, 40)])
def test_any_size_comes_back_in_its_size(
    size: tuple[int, int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", size[::-1], "red").save(tmp_path / "a.png")
    file = tmp_path / "latents.safetensors"
    assert cli.main(["encode", str(tmp_path / "a.png"), "--model", str(model), "--output", str(file)]) == 0
    assert cli.main(["decode", str(file), "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == size[::-1]


# weights


def config(**changes: Any) -> Make:
    """Other entries in config.json."""

    def make(folder: Path) -> Path:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    return make


def text(file: str, content: str | bytes) -> Make:
    """Another content of a file of the folder."""

    def make(folder: Path) -> Path:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


def tensors(change: Callable[[dict[str, mx.array]], object]) -> Make:
    """Other tensors."""

    def make(folder: Path) -> Path:
        held = read_safetensors(folder / WEIGHTS)[0]
        mx.eval(held)
        change(held)
        write_safetensors(folder / WEIGHTS, held)
        return folder

    return make


def cut(keep: float) -> Make:
    def make(folder: Path) -> Path:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * keep)])
        return folder

    return make


def header(change: Callable[[dict[str, Any]], object]) -> Make:
    """The same bytes with a changed header."""

    def make(folder: Path) -> Path:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        fields = json.loads(content[8:end])
        change(fields)
        new = json.dumps(fields).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + content[end:])
        return folder

    return make


def without(file: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / file).unlink()
        return folder

    return make


def index(content: Any) -> Make:
    """Weights in shards, of which this is the index."""

    def make(folder: Path) -> Path:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
        return folder

    return make


def alone(file: str, write: Callable[[Path], object]) -> Make:
    """A file by itself."""

    def make(folder: Path) -> Path:
        write(folder / file)
        return folder / file

    return make


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def pipeline_without_autoencoder(folder: Path) -> Path:
    (folder / "model_index.json").write_text("{}")
    return folder


SENTINEL = "executed"
HOSTILE = call(name("os", "system"), f"touch {SENTINEL}")
PICKLES = {"hostile": PROTOCOL + dump(HOSTILE) + b".", "list": PROTOCOL + dump([1, 2]) + b"."}
FIRST = "decoder.conv_in.bias"

BAD: dict[str, tuple[Make, str]] = {
    # files
    "no such path": (nowhere, "nowhere: no such file or folder"),
    "an empty folder": (empty_folder, "no autoencoder"),
    "a pipeline without autoencoder": (pipeline_without_autoencoder, "vae"),
    "no config.json and two weights files": (
        lambda folder: without("config.json")(text("b.safetensors", "")(folder)),
        "2 weights files",
    ),
    "no weights": (without(WEIGHTS), "no such weights file"),
    "empty weights": (text(WEIGHTS, b""), f"{WEIGHTS}: not a complete safetensors file"),
    "weights cut in the middle": (cut(0.5), f"{WEIGHTS}: not a complete safetensors file"),
    "weights cut in the header": (cut(0.01), f"{WEIGHTS}: not a complete safetensors file"),
    "bytes behind the end": (
        lambda folder: text(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"more")(folder),
        f"{WEIGHTS}: not a complete safetensors file",
    ),
    "a text called .safetensors": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), WEIGHTS),
    "a page called .safetensors": (text(WEIGHTS, "<!DOCTYPE html><title>404</title>"), WEIGHTS),
    "a header longer than the file": (text(WEIGHTS, (1 << 40).to_bytes(8, "little") + b"{}"), "a header of"),
    "a header that is no JSON": (text(WEIGHTS, (4).to_bytes(8, "little") + b"{{{{"), WEIGHTS),
    "a header that is a list": (text(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), "not a JSON object"),
    "a header nested without end": (text(WEIGHTS, (9000).to_bytes(8, "little") + b"[" * 9000), f"{WEIGHTS}: not a"),
    "overlapping tensors": (header(lambda content: content[FIRST].update(data_offsets=[4, 68])), "byte"),
    "offsets outside": (header(lambda content: content[FIRST].update(data_offsets=[1 << 30, (1 << 30) + 64])), "byte"),
    "offsets of another length": (header(lambda content: content[FIRST].update(shape=[17])), "does not fit"),
    "a negative size": (header(lambda content: content[FIRST].update(shape=[-16])), "impossible shape"),
    "an unknown dtype": (header(lambda content: content[FIRST].update(dtype="F99")), "F99"),
    # shards
    "an index without map": (index({}), "no weight_map"),
    "a shard outside the folder": (index({"weight_map": {FIRST: f"../{WEIGHTS}"}}), "not a file in this folder"),
    "a shard at an absolute path": (index({"weight_map": {FIRST: "/etc/passwd"}}), "not a file in this folder"),
    "a shard that is not there": (index({"weight_map": {FIRST: "1.safetensors"}}), "no such weights file"),
    # tensors
    "a missing tensor": (tensors(lambda held: held.pop(FIRST)), f"missing: {FIRST}"),
    "an unknown tensor": (tensors(lambda held: held.update(extra=mx.zeros(1))), "unknown: extra"),
    "a misshapen tensor": (tensors(lambda held: held.update({FIRST: mx.zeros(3)})), f"misshapen: {FIRST}"),
    "whole numbers for weights": (
        tensors(lambda held: held.update({FIRST: mx.zeros(16, mx.int32)})),
        FIRST,
    ),
    "a LoRA": (tensors(lambda held: (held.clear(), held.update({"lora_A.weight": mx.zeros((2, 2))}))), "lora_A"),
    "no tensors": (tensors(lambda held: held.clear()), "180 missing"),
    # config.json
    "a config.json cut short": (text("config.json", '{"latent_channels": '), "config.json: not valid JSON"),
    "a config.json that is a list": (text("config.json", "[]"), "config.json: not a JSON object"),
    "a config.json in UTF-16": (text("config.json", "{}".encode("utf-16")), "config.json: is UTF-16"),
    "an unknown class": (config(_class_name="VQModel"), "VQModel"),
    "negative channels": (config(latent_channels=-4), "latent_channels"),
    "a word for a number": (config(latent_channels="four"), "invalid"),
    "no levels": (config(block_out_channels=[]), "block_out_channels"),
    "groups that do not divide": (config(norm_num_groups=5), "norm_num_groups"),
    "an unknown activation": (config(act_fn="gelu"), "gelu"),
    "an unknown block": (config(down_block_types=["SkipDownBlock2D"] * 4), "SkipDownBlock2D"),
    "a scale of zero": (config(scaling_factor=0), "scaling_factor"),
    # torch's files
    "a hostile pickle": (alone("a.pt", lambda path: path.write_bytes(PICKLES["hostile"])), "a.pt"),
    "a hostile pickle in a zip": (alone("a.ckpt", lambda path: write_zip(path, HOSTILE, {})), "a.ckpt"),
    "a hostile pickle of old": (alone("a.pth", lambda path: write_old(path, HOSTILE, {})), "a.pth"),
    "a pickle of something else": (alone("a.bin", lambda path: path.write_bytes(PICKLES["list"])), "a.bin"),
    "a zip without pickle": (
        alone("a.ckpt", lambda path: shutil.make_archive(str(path.with_suffix("")), "zip", path.parent, "config.json")
              and path.with_suffix(".zip").rename(path)),
        "a.ckpt",
    ),
    "a zip cut short": (
        alone("a.ckpt", lambda path: path.write_bytes(write_zip(path, {}, {"0": bytes(999)}).read_bytes()[:500])),
        "a.ckpt",
    ),
    "a picture": (alone("a.png", lambda path: Image.new("RGB", (9, 9)).save(path)), "a.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_models(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, word = BAD[kind]
    source = make(Path(shutil.copytree(model, tmp_path / "model")))
    Image.new("RGB", (9, 9)).save("a.png")
    refused(capsys, ["reconstruct", "a.png", "--model", source, "--output", "out"], word, str(source))
    assert not os.path.exists(SENTINEL) and not os.path.exists("out")


# files of latents


def damaged(**changes: Any) -> Callable[[Path], object]:
    """Metadata that do not describe the tensors."""

    def make(file: Path) -> None:
        held, metadata = read_safetensors(file)
        mx.eval(held)
        write_safetensors(file, held, {**metadata, **changes})

    return make


LATENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "of no format": (damaged(format="other"), "mflux-vae encode"),
    "without settings": (damaged(settings="no JSON"), "metadata"),
    "with settings that are a list": (damaged(settings="[]"), "metadata"),
    "of pictures that are not there": (damaged(pictures='{"b.png": {"size": [8, 8], "crc32": 0}}'), "b.png"),
    "of pictures without size": (damaged(pictures='{"a.png": {"crc32": 0}}'), "size"),
    "of another size": (damaged(pictures='{"a.png": {"size": [800, 8], "crc32": 0}}'), "cannot be an image of 800"),
    "elsewhere": (damaged(pictures='{"../a.png": {"size": [8, 8], "crc32": 0}}'), "../a.png"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "not a complete safetensors file"),
}


@pytest.mark.parametrize("kind", LATENTS)
def test_latents(kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latents.safetensors"
    latent_file.write(file, {"a.png": latent_file.Entry(mx.zeros((4, 1, 1)), (8, 8), 0)}, {"model": str(model)})
    change, word = LATENTS[kind]
    change(file)
    refused(capsys, ["decode", file, "--output", tmp_path / "out"], str(file), word)
    assert not (tmp_path / "out").exists()


# flags


FLAGS: dict[str, tuple[list[str], str]] = {
    "no command": ([], "COMMAND"),
    "an unknown command": (["encoed"], "encoed"),
    "an unknown flag": (["info", "--jsn"], "--jsn"),
    "no pictures": (["encode", "--model", "MODEL", "--output", "x"], "pictures"),
    "no model": (["reconstruct", "a.png"], "--model"),
    "a tile of no size": (["reconstruct", "a.png", "--model", "MODEL", "--tiling", "exact", "--tile", "0"], "got 0"),
    "a tile that is a word": (["reconstruct", "a.png", "--model", "MODEL", "--tile", "big"], "'big'"),
    "an unknown tiling": (["reconstruct", "a.png", "--model", "MODEL", "--tiling", "some"], "'some'"),
    "an unknown dtype": (["reconstruct", "a.png", "--model", "MODEL", "--dtype", "int8"], "'int8'"),
    "a difference times nothing": (["reconstruct", "a.png", "--model", "MODEL", "--amplify", "0"], "--amplify"),
    "a difference times nan": (["reconstruct", "a.png", "--model", "MODEL", "--amplify", "nan"], "--amplify"),
    "an unknown naming": (["convert", "MODEL", "x.safetensors", "--naming", "kohya"], "'kohya'"),
    "an unknown preset for config": (["info", "MODEL", "--config", "sd9"], "sd9"),
    "a folder as output": (["encode", "a.png", "--model", "MODEL", "--output", "."], "is a folder"),
    "a file as output": (["reconstruct", "a.png", "--model", "MODEL", "--output", "a.png"], "is a file"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("a.png")
    flags, word = FLAGS[kind]
    refused(capsys, [str(model) if flag == "MODEL" else flag for flag in flags], word)
    assert os.listdir() == ["a.png"]
