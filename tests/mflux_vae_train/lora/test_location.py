"""Adapters on the hub: what is downloaded with them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest

from mflux_vae.weights.formats.files import write_json, write_safetensors, write_text
from mflux_vae_train import lora
from mflux_vae_train.lora.metadata import base_model
from tests.mflux_vae_train.training.tiny_model import Net


@pytest.mark.parametrize("inside", ["", "sub/cat.safetensors"])
def test_the_files_beside_an_adapter_come_with_it(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT states alpha in one of them."""
    name = inside or "adapter_model.safetensors"
    there = {name, *(str(Path(name).with_name(beside)) for beside in ("adapter_config.json", "README.md")), "other.bin"}

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        for file in there:
            if not any(fnmatch(file, pattern) for pattern in allow_patterns):
                continue
            if file.endswith(".json"):
                write_json(tmp_path / file, {"r": 2, "lora_alpha": 16})
            elif file.endswith(".md"):
                write_text(tmp_path / file, "---\nbase_model: owner/model\n---\n")
            else:
                pair = {"out.lora_A.weight": mx.ones((2, 4)), "out.lora_B.weight": mx.ones((3, 2))}
                write_safetensors(tmp_path / file, pair)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = lora.fetch_adapter(f"owner/name/{inside}".rstrip("/"))
    assert (
        path is not None and base_model(path) == ("model card", "owner/model") and not (tmp_path / "other.bin").exists()
    )
    if not inside:  # a file of another name is not PEFT's
        assert lora.read_adapter(path, {"transformer": Net()})["transformer"].alphas == {"out": 16.0}
