"""Everything that reads a file from outside, as targets for broken files."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mflux_vae.cli import latent_file
from mflux_vae.image_folder.scan import scan
from mflux_vae.images import image_text, load_image
from mflux_vae.pretrained.loading import new_network
from mflux_vae.pretrained.locate import settings_of
from mflux_vae.weights.formats.files import open_folder, open_weights
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.flow.files import read_configs
from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.pipelines.text.tokenizer import load_tokenizer
from mflux_vae_train.settings import flags
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.sources import frames, mnist, npz
from tests.fuzzing.mutations import PICTURE_BYTES, Target
from tests.mflux_vae.weights.torch_writer import of_arrays, write_old, write_zip


def _weights(path: Path) -> None:
    tensors, _ = open_weights(path)
    mx.eval([stored.load() for stored in tensors.values()])


def _shards(folder: Path) -> None:
    mx.eval([stored.load() for stored in open_folder(folder, "model").values()])


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer.max_length is None or tokenizer.max_length <= 1000:
        tokenizer.encode(["a photo of a star", ""], None if tokenizer.max_length else 8)


def _picture(folder: Path) -> None:
    load_image(folder / "a.png", resolution=8)
    image_text(folder / "a.png")


def _captions(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    scanned = scan(folder)
    for caption in captions(scanned, prompt="a photo").texts.values():
        caption.encode()  # as they are hashed, tokenized and written


def _checkpoint(folder: Path) -> None:
    checkpoint.latest(folder)
    tree = {"a": mx.zeros((2,)), "n": 1}
    checkpoint.load(folder / "checkpoint-1", {"run": state.tree_state(tree)}, fingerprint={"seed": 0})


_PARTS = {"transformer": {"lora_one": ("layers.0", "layers.1")}}
"""Two layers that kohya's naming has as one."""


def _adapted() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 2))


def _adapter(folder: Path) -> None:
    network = _adapted()
    lora.load_adapter({"transformer": network}, folder / "a.safetensors", _PARTS)
    mx.eval(network.parameters())


def _adapters(folder: Path) -> list[bytes]:
    """In PEFT's naming and in kohya's."""
    network = _adapted()
    lora.add_lora(network, ["*"], rank=1)
    lora.save_adapter({"transformer": network}, folder / "p.safetensors")
    for layer in lora.layers(network).values():
        layer.lora_b = mx.ones_like(layer.lora_b)
    mx.save_safetensors(
        str(folder / "k.safetensors"),
        lora.kohya_tensors(network, _PARTS["transformer"]),
        {"ss_network_dim": "1", "format": "pt"},
    )
    return [(folder / name).read_bytes() for name in ("p.safetensors", "k.safetensors")]


def _autoencoder(folder: Path) -> None:
    new_network(folder / "config.json")


def _pictures() -> list[bytes]:
    """One of each kind."""
    red = Image.new("RGB", (9, 7), "red")
    found = []
    for kind, image, options in (
        ("PNG", red, {}),
        ("PNG", red.convert("P"), {"transparency": 0}),
        ("PNG", Image.fromarray(np.full((5, 6), 40000, np.uint16)), {}),
        ("JPEG", red, {"exif": _turned()}),
        ("GIF", red.convert("P"), {"save_all": True, "append_images": [Image.new("P", (9, 7), 3)]}),
        ("WEBP", red, {}),
        ("TIFF", red, {"compression": "tiff_lzw"}),
        ("BMP", red, {}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)  # type: ignore[arg-type]
        found.append(file.getvalue())
    return found


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _safetensors(**metadata: str) -> bytes:
    header = {
        "__metadata__": metadata,
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(12)


def _torch(write: Callable[..., Path], folder: Path) -> bytes:
    tensors, storages = of_arrays({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, old=write is write_old)
    return write(folder / "seed", {"state_dict": tensors, "step": 1}, storages).read_bytes()


def _checkpoint_files(folder: Path) -> dict[str, bytes]:
    written = checkpoint.save(
        folder, 1, {"run": state.tree_state({"a": mx.zeros((2,)), "n": 1})}, fingerprint={"seed": 0}
    )
    return {f"checkpoint-1/{name}": (written / name).read_bytes() for name in (checkpoint.ARRAYS, checkpoint.VALUES)}


def _latents(folder: Path) -> bytes:
    latent_file.write(folder / "l", {"a.png": latent_file.Entry(mx.zeros((1, 1, 1)), (8, 8), 0)}, {"model": "tiny"})
    return (folder / "l").read_bytes()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x_train=np.zeros((2, 5, 5), np.uint8), x_test=np.zeros((1, 5, 5), np.uint8))
    return file.getvalue()


def _mlx_npz(folder: Path) -> bytes:
    mx.savez(str(folder / "b.npz"), **{"a.weight": mx.zeros((2, 3)), "a.bias": mx.zeros((2,), mx.bfloat16)})
    return (folder / "b.npz").read_bytes()


_IDX = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(18)
_INDEX = {"metadata": {"total_size": 12}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
_DDCONFIG = (
    b"model:\n  params:\n    ddconfig: {ch: 32, ch_mult: [1, 2], num_res_blocks: 1, z_channels: 4, out_ch: 3,"
    b" in_channels: 3, resolution: 32}\n"
)
_SETTINGS = b"model: tiny\ninstance_data_dir: a\ninstance_prompt: 'a photo'\nlearning_rate: 5e-6\nmax_grad_norm: 1\n"


def _targets(scratch: Path) -> dict[str, Target]:
    """All of them, by name; `scratch` is where good files are made first."""
    folder = tiny.WEIGHTS

    def stored(*names: str) -> list[bytes]:
        return [(folder / name).read_bytes() for name in names]

    def beside(*names: str) -> list[tuple[str, bytes]]:
        return [(name, (folder / name).read_bytes()) for name in names]

    saved = _checkpoint_files(scratch)
    configs = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/config.json"))]
    configs += ["model_index.json", "recommended.json", "scheduler/scheduler_config.json"]
    found = {
        "picture": Target("a.png", _pictures(), _picture, base=PICTURE_BYTES),
        "safetensors": Target("a.safetensors", [_safetensors(), _safetensors(format="pt")], _file),
        "adapter": Target("a.safetensors", _adapters(scratch), _adapter),
        "torch, zip": Target("a.pt", [_torch(write_zip, scratch)], _file),
        "torch, old": Target("a.ckpt", [_torch(write_old, scratch)], _file),
        "index of shards": Target(
            "model.safetensors.index.json",
            [json.dumps(_INDEX).encode()],
            _shards,
            [("one.safetensors", _safetensors())],
        ),
        "autoencoder's config": Target("config.json", stored("vae/config.json"), _autoencoder),
        "ddconfig": Target("a.yaml", [_DDCONFIG], lambda here: settings_of(here / "a.yaml")),
        "settings": Target("a.yaml", [_SETTINGS], _settings(DreamBoothSettings)),
        "settings of an autoencoder": Target(
            "a.yaml", [b"image_size: 28\nhidden_dims: [4, 8]\n"], _settings(VAETrainingSettings)
        ),
        "tokenizer": Target(
            "tokenizer.json",
            stored("tokenizer/tokenizer.json"),
            _tokenizer,
            _named(beside("tokenizer/tokenizer_config.json")),
        ),
        "tokenizer's config": Target(
            "tokenizer_config.json",
            stored("tokenizer/tokenizer_config.json"),
            _tokenizer,
            _named(beside("tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json")),
        ),
        "vocabulary": Target("vocab.json", stored("tokenizer/vocab.json"), _tokenizer, _clip(beside)),
        "merges": Target("merges.txt", stored("tokenizer/merges.txt"), _tokenizer, _clip(beside)),
        "captions": Target("metadata.jsonl", [b'{"file_name": "a.png", "text": "a dog"}\n'], _captions),
        "caption": Target("a.txt", [b"a photo of sks dog\n"], _captions),
        "list of videos": Target("v.json", [b'[{"id": "1"}, "2"]'], _videos, [("1/0.jpg", b""), ("2/0.jpg", b"")]),
        "weights in npz": Target("b.npz", [_mlx_npz(scratch)], _file),
        "npz": Target("a.npz", [_npz()], lambda here: npz(here / "a.npz")),
        "IDX": Target("a.idx", [_IDX, gzip.compress(_IDX)], lambda here: mnist(here / "a.idx")),
        "latents": Target("l.safetensors", [_latents(scratch)], lambda here: latent_file.read(here / "l.safetensors")),
    }
    for name in saved:
        others = [(other, content) for other, content in saved.items() if other != name]
        found[name] = Target(name, [saved[name]], _checkpoint, others)
    for name in configs:
        others = beside(*(one for one in configs if one != name))
        found[name] = Target(name, stored(name), partial(read_configs, FAMILY), others)
    return found


def _file(folder: Path) -> None:
    for path in folder.iterdir():
        _weights(path)


def _settings(cls: type) -> Callable[[Path], object]:
    return lambda folder: repr(flags.from_yaml(cls, folder / "a.yaml"))


def _videos(folder: Path) -> None:
    frames(folder, folder / "v.json", size=8, channels=3)


def _named(files: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Without their folder."""
    return [(Path(name).name, content) for name, content in files]


def _clip(beside: Callable[..., list[tuple[str, bytes]]]) -> list[tuple[str, bytes]]:
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    return _named(beside(*(f"tokenizer/{name}" for name in names)))


with tempfile.TemporaryDirectory() as _scratch:
    TARGETS = _targets(Path(_scratch))
