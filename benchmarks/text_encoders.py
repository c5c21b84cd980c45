"""T5's and CLIP's text encoders at base size against transformers: four prompts at once.

    python -m benchmarks.text_encoders

T5 1.1 base (12 layers, width 768, gated GELU) on 4 x 256 tokens, CLIP ViT-B's text encoder (12 layers, width 512) on
4 x 77.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.harness.backends import mlx_work, torch_device, torch_work
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch

PROMPTS = 4
T5: dict[str, Any] = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
CLIP: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
CASES = {"T5": (T5, 256), "CLIP": (CLIP, 77)}
GAINS = {".SelfAttention.q.": T5["d_kv"] ** -0.5}
"""T5 scales its queries by their weights alone."""


def rows(options: Options) -> list[Row]:
    """The measurements."""
    return [
        Row(
            work=f"{name} base, encode {PROMPTS} x {tokens} tokens",
            ours=Implementation(
                name="mflux-vae",
                build="benchmarks.text_encoders:ours",
                settings={"case": name},
                imports=(f"mflux_vae_train.pipelines.text.{name.lower()}",),
            ),
            peers=[
                Implementation(
                    name="torch",
                    build="benchmarks.text_encoders:transformers",
                    settings={"case": name, "gpu": options.gpu},
                    imports=(f"transformers.models.{name.lower()}.modeling_{name.lower()}", "torch"),
                )
            ],
            target=1.0,
            tolerance=1e-2 if options.gpu else 1e-3,
        )
        for name, (_, tokens) in CASES.items()
    ]


def inputs(case: str) -> np.ndarray:
    """Token ids (prompts, tokens), the last one CLIP's end of text."""
    config, tokens = CASES[case]
    ids = np.random.default_rng(0).integers(10, config["vocab_size"] - 10, (PROMPTS, tokens))
    ids[:, -1] = config.get("eos_token_id", 1)
    return ids


def ours(case: str) -> Work:
    """This project's encoder."""
    import mlx.core as mx

    from mflux_vae_train.pipelines.text.clip import CLIPTextConfig, CLIPTextModel
    from mflux_vae_train.pipelines.text.t5 import T5Config, T5Encoder

    ids = mx.array(inputs(case))
    if case == "T5":
        t5 = T5Encoder(T5Config(**T5))
        fill_mlx(t5, GAINS)
        return mlx_work(lambda: {"hidden": t5(ids)})
    clip = CLIPTextModel(CLIPTextConfig(**CLIP))
    fill_mlx(clip)
    return mlx_work(lambda: dict(zip(("hidden", "pooled"), clip(ids), strict=True)))


def transformers(case: str, gpu: bool) -> Work:
    """transformers' encoder."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    device = torch_device(gpu)
    network: Any = T5EncoderModel(T5Config(**T5)) if case == "T5" else CLIPTextModel(CLIPTextConfig(**CLIP))
    fill_torch(network, GAINS if case == "T5" else None, prefix="" if case == "T5" else "text_model.")
    network = network.eval().to(device)
    ids = torch.from_numpy(inputs(case)).to(device)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            out = network(ids)
        return {"hidden": out.last_hidden_state} | ({} if case == "T5" else {"pooled": out.pooler_output})

    return torch_work(run, device)


if __name__ == "__main__":
    sys.exit(main({"text_encoders": rows}, __doc__))
