"""Write the answers of diffusers and transformers for small networks, for tests where these packages are absent.

    python -m tests.parity.make_golden

Each folder holds a network as diffusers saves it (half precision) and `golden.safetensors`: `pixels` in [-1, 1], the
encoder's `moments` (TAESD's: its latents), and `decoded`, the image of their mean; FLUX.2's also `scaled`, what its
pipeline makes of that mean. NCHW, computed in float32. `laq` holds LAPA's quantizer as LAPA saves it, of which
`tests/parity/lapa.py` gives the answers: `difference` and `codes` of the frames `first` and `last`, in [0, 1], and
`decoded`, the second frame. The folders of `TEXT_GOLDEN` hold text encoders as transformers saves them, and for
`input_ids` all hidden states, `last` after the final norm, and the output `pooled` and, with a projection, projected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, Flux2Pipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mflux_vae.networks.laq import LAQConfig
from tests.parity.references.lapa import TheirLatentActionQuantization

GOLDEN = Path(__file__).parents[1] / "mflux_vae" / "golden"
SIZE_LIMIT = 200_000
"""Bytes of a folder."""

BLOCKS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "": (AutoencoderKL, {**BLOCKS, "latent_channels": 6, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "attention": (
        AutoencoderKL,
        {
            **BLOCKS,
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latents_mean": (0.5, -0.25, 0.125, 1.0),
            "latents_std": (2.0, 0.5, 1.5, 3.0),
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "flux2": (AutoencoderKLFlux2, {**BLOCKS, "decoder_block_out_channels": (4, 8, 8), "latent_channels": 3}),
    "tiny": (
        AutoencoderTiny,
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 2),
            "num_decoder_blocks": (2, 1, 1),
            "latent_channels": 5,
        },
    ),
}
"""By folder: class and settings."""

TEXT_GOLDEN = Path(__file__).parents[1] / "mflux_vae_train" / "pipelines" / "text" / "golden"
TEXT_ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip_l": (CLIPTextModel, {"hidden_act": "quick_gelu"}),
    "openclip_h": (CLIPTextModel, {"hidden_act": "gelu", "num_hidden_layers": 2}),
    "openclip_bigg": (CLIPTextModelWithProjection, {"hidden_act": "gelu", "projection_dim": 12}),
}
"""By folder: class and settings beside those of `write_text_encoder`."""

LAQ = LAQConfig(
    dim=16, quant_dim=8, image_size=32, patch_size=4, spatial_depth=2, temporal_depth=1, dim_head=8, heads=2
)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights nowhere zero or one, of a size that keeps the signal's; statistics as if trained."""
    draws = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        spread = max(value.numel() // value.shape[0], 1) ** -0.5 if value.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.copy_(offset + spread * torch.randn(value.shape, generator=draws))
    for name, value in sorted(model.named_buffers()):
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape, generator=draws) + 0.25)


@torch.no_grad()
def answers(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network makes of pixels, and what its own pipelines make of that."""
    if isinstance(model, AutoencoderTiny):
        latents = model.encode(pixels).latents
        return {"moments": latents, "decoded": model.decode(latents).sample}
    moments = model.encode(pixels).latent_dist.parameters
    mean = moments.chunk(2, dim=1)[0]
    found = {"moments": moments, "decoded": model.decode(mean).sample}
    if isinstance(model, AutoencoderKLFlux2):
        center, variance = (part.view(1, -1, 1, 1) for part in (model.bn.running_mean, model.bn.running_var))
        patches = Flux2Pipeline._patchify_latents(mean)
        found["scaled"] = (patches - center) / torch.sqrt(variance + model.config.batch_norm_eps)
    return found


def main() -> None:
    """Write the folders anew."""
    for name, (kind, settings) in NETWORKS.items():
        folder = GOLDEN / name
        model = kind(**settings)
        randomise(model)
        model.half().save_pretrained(folder)
        model = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
        size = (2, 3, 24, 32) if name else (2, 3, 20, 28)
        pixels = (2 * torch.rand(size, generator=torch.Generator().manual_seed(1)) - 1).half().float()
        tensors = {"pixels": pixels, **answers(model, pixels)}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "golden.safetensors")
    write_laq(GOLDEN / "laq")
    for name in TEXT_ENCODERS:
        write_text_encoder(name)
    written_folders = *(GOLDEN / name for name in (*NETWORKS, "laq")), *(TEXT_GOLDEN / name for name in TEXT_ENCODERS)
    for folder in written_folders:
        written = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        if written > SIZE_LIMIT:
            raise SystemExit(f"{folder} has {written} bytes, more than {SIZE_LIMIT}")


@torch.no_grad()
def write_text_encoder(name: str) -> None:
    """A text encoder's folder anew."""
    kind, settings = TEXT_ENCODERS[name]
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    model = kind(CLIPTextConfig(**sizes | settings))
    randomise(model)
    model.half().save_pretrained(TEXT_GOLDEN / name)
    model = kind.from_pretrained(TEXT_GOLDEN / name, dtype=torch.float32).eval()
    ids = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((1, 6, 11)):
        ids[row, end], ids[row, end + 1 :] = 59, 0
    found = model(ids, output_hidden_states=True)
    tensors = {f"hidden.{index}": state for index, state in enumerate(found.hidden_states)}
    pooled = found.text_embeds if kind is CLIPTextModelWithProjection else found.pooler_output
    tensors |= {"input_ids": ids.int(), "last": found.last_hidden_state, "pooled": pooled}
    save_file({key: one.contiguous() for key, one in tensors.items()}, TEXT_GOLDEN / name / "golden.safetensors")


@torch.no_grad()
def write_laq(folder: Path) -> None:
    """The quantizer's folder anew."""
    folder.mkdir(exist_ok=True)
    model = TheirLatentActionQuantization(LAQ).eval()
    randomise_laq(model)
    torch.save(model.state_dict(), folder / "vae.pt")
    (folder / "config.json").write_text(json.dumps(LAQ.to_dict(), indent=2) + "\n")
    size = (1, LAQ.channels, LAQ.image_size, LAQ.image_size)
    first, last = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    codes = model.encode(first, last)
    answers = {"difference": model.difference(first, last), "codes": codes, "decoded": model.decode(first, codes)}
    tensors = {"first": first, "last": last, **answers}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "golden.safetensors")


@torch.no_grad()
def randomise_laq(model: torch.nn.Module, seed: int = 0) -> None:
    """Gains and shifts that are nowhere one or zero, too; a codebook as small as what it rounds."""
    randomise(model, seed)
    for name, value in model.named_parameters():
        if name.endswith(("gamma", "_scale")):
            value.add_(1)
    model.vq.codebooks.mul_(0.3)


if __name__ == "__main__":
    main()
