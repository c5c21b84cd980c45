"""Flags of diffusers' DreamBooth scripts that have no effect here, each with the reason for the log or the error.

All their other flags are fields of `DreamBoothSettings` with the same names. The scripts differ in their defaults; here
the pipeline recommends resolution, rank and learning rate.
"""

from __future__ import annotations

from mflux_vae_train.settings.values import IgnoredFlags, Refused

_REASONS = {
    # machine
    "it is an option of torch or CUDA": "allow_tf32 enable_npu_flash_attention set_grads_to_none fsdp_text_encoder",
    "networks are loaded when they are first used, and freed when their work is done": "offload",
    "training in fp8 is torchao's; --quantize 8 saves memory": "do_fp8_training",
    "attention is MLX's fused kernel, which does not store the scores": "enable_xformers_memory_efficient_attention",
    "`mlx.launch` starts and numbers the processes": "local_rank",
    "images are encoded once before training, so there is no data loader": (
        "dataloader_num_workers num_dataloader_workers"
    ),
    "the base model computes in bfloat16 on Metal and CUDA and in float32 on a CPU; trained weights, noise and loss are"
    " float32": "mixed_precision prior_generation_precision",
    "adapters are trained and saved in float32": "upcast_before_saving",
    # data
    "latents are always cached": "cache_latents",
    "prompts are encoded once before training, unless --train_text_encoder changes their encoder": (
        "pre_compute_text_embeddings"
    ),
    "images come from the folder --instance_data_dir, with prompts in metadata.jsonl, metadata.csv or .txt files": (
        "dataset_name dataset_config_name image_column"
    ),
    "images are resized with the Lanczos filter, the scripts' default": "image_interpolation_mode",
    # text encoders
    "trained text encoders are always saved, adapters in one file with the denoiser's": "skip_save_text_encoder",
    "only pivotal tuning (--train_text_encoder_ti) has new tokens": (
        "token_abstraction num_new_tokens_per_abstraction train_text_encoder_ti_frac"
    ),
    # hub
    "nothing is uploaded; run `hf upload` on the output folder": "push_to_hub hub_model_id",
    "downloads use the token of `hf auth login` or HF_TOKEN, and nothing is uploaded": "hub_token",
    "downloads go to the Hub's cache; move it with the environment variable HF_HOME": "cache_dir",
    # pipeline
    "the pipeline's tokenizers are used": "tokenizer_name",
    "prompts are as long as the model was trained with; some models take --max_sequence_length": "tokenizer_max_length",
    "pipelines mask padding as their models were trained": "text_encoder_use_attention_mask",
    "only models for upscaling have class labels as an input": "class_labels_conditioning",
    "previews use the pipeline's sampler": "validation_scheduler",
    "previews are sampled from prompts: --validation_prompt": "validation_images",
    "the last preview is drawn by the networks in memory; --num_validation_images 0 turns previews off": (
        "skip_final_inference"
    ),
}

_REFUSED = {
    "do_edm_style_training": Refused(
        "the objective is that of the model, which predicts noise, v or velocity, never EDM's; leave it out"
    ),
    "train_text_encoder_ti": Refused(
        "no new tokens are trained; name the subject by a rare word, such as sks, and give --train_text_encoder"
    ),
    "train_text_encoder_frac": Refused(
        "text encoders are trained until the end; leave it out, and lower --text_encoder_lr", default=("1", "1.0")
    ),
    "text_encoder_out_layers": Refused(
        "prompts are encoded by the layers that the model was trained with (FLUX.2 klein: 9 18 27, not the script's"
        " 10 20 30); leave it out",
        default=("9 18 27", "9,18,27", "[9, 18, 27]"),
    ),
    "use_blora": Refused("give --lora_layers b-lora instead"),
    "lora_unet_blocks": Refused(
        "give patterns of layers instead, for example --lora_layers 'up_blocks.0.attentions.0.*.to_*'"
    ),
}

IGNORED_FLAGS: IgnoredFlags = {
    **{name: reason for reason, names in _REASONS.items() for name in names.split()},
    **_REFUSED,
}
"""Each flag of diffusers' DreamBooth scripts is a setting of the same name, or is ignored or refused with a reason."""
