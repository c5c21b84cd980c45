"""Flags that users of other DreamBooth scripts give, and that do nothing here: each with the reason, for the log.

They come from diffusers' DreamBooth scripts. All their other flags are fields of
`DreamBoothSettings`, under their names.
"""

from __future__ import annotations

from collections.abc import Mapping

_MLX = "it is a switch of torch or CUDA, and MLX has none"
_PRECISION = (
    "a base model computes in the precision it is loaded in (bfloat16 on Metal and CUDA, float32 on a CPU); what is"
    " trained, noise and loss are float32"
)
_LOADED = "pictures are encoded once before the training; nothing is left to load"
_HUB = "nothing is uploaded; `hf upload` takes the output folder as it is"
_DATASET = "pictures come from folders: --instance_data_dir, with prompts in metadata.jsonl or .txt files"
_WEIGHTING = "noise levels are weighted with --weighting_scheme"
_NO_OFFSET = "noise is drawn without an offset, as the models were trained"

IGNORED_FLAGS: Mapping[str, str] = {
    # machine
    "allow_tf32": _MLX,
    "enable_xformers_memory_efficient_attention": "attention is MLX's fused kernel, which never holds the scores",
    "enable_npu_flash_attention": _MLX,
    "set_grads_to_none": _MLX,
    "local_rank": "processes are started by `mlx.launch`, which numbers them",
    "dataloader_num_workers": _LOADED,
    "num_dataloader_workers": _LOADED,
    "mixed_precision": _PRECISION,
    "prior_generation_precision": _PRECISION,
    "upcast_before_saving": "adapters are trained and saved in float32",
    # data
    "cache_latents": "latents are always cached",
    "pre_compute_text_embeddings": "prompts are always encoded once, before the training",
    "dataset_name": _DATASET,
    "dataset_config_name": _DATASET,
    "image_column": _DATASET,
    "image_interpolation_mode": "pictures are resized with Lanczos' filter",
    # objective
    "snr_gamma": _WEIGHTING,
    "offset_noise": _NO_OFFSET,
    "noise_offset": _NO_OFFSET,
    # text encoders
    "skip_save_text_encoder": "the adapter of --train_text_encoder is in the same file as the denoiser's",
    # hub
    "push_to_hub": _HUB,
    "hub_token": "downloads use the token of `hf auth login` or HF_TOKEN, and " + _HUB,
    "hub_model_id": _HUB,
    "cache_dir": "downloads go to the hub's own cache: set HF_HOME in the environment to move it",
    # what pipelines know by themselves
    "tokenizer_name": "a pipeline's own tokenizers are used",
    "tokenizer_max_length": "a pipeline's own tokenizers are used",
    "text_encoder_use_attention_mask": "pipelines mask padding as their models were trained",
    "class_labels_conditioning": "pipelines are conditioned on prompts alone",
    "validation_scheduler": "previews use the pipeline's own sampler",
    "validation_images": "previews are drawn from prompts: --validation_prompt",
}
