"""Each flag of diffusers' DreamBooth scripts is a setting of the same name, or is ignored with a reason."""

from __future__ import annotations

import dataclasses
import logging
import typing

import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.ignored_flags import IGNORED_FLAGS
from mflux_vae_train.settings.fields import field_type, is_tuple
from mflux_vae_train.settings.flags import settings_from

NEEDED = ["--model=tiny", "--instance_data_dir=pictures", "--instance_prompt=a photo of sks dog"]

FLUX = {
    "allow_tf32": True, "adam_beta1": "0.8", "adam_beta2": "0.9", "adam_epsilon": "1e-7", "adam_weight_decay": "1e-3",
    "cache_latents": True, "caption_column": "text", "center_crop": True, "checkpointing_steps": "100",
    "checkpoints_total_limit": "3", "class_data_dir": "dogs", "class_prompt": "a dog", "dataloader_num_workers": "4",
    "enable_xformers_memory_efficient_attention": True, "gradient_accumulation_steps": "2",
    "gradient_checkpointing": True, "guidance_scale": "3.5", "instance_data_dir": "mine", "instance_prompt": "a",
    "learning_rate": "1e-5", "local_rank": "0", "logging_dir": "logs", "logit_mean": "0.5", "logit_std": "2",
    "lora_alpha": "8", "lora_dropout": "0.1", "lora_layers": "attn.to_k,attn.to_q", "lr_num_cycles": "2",
    "lr_power": "2", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "5", "max_grad_norm": "2",
    "max_train_steps": "10", "mixed_precision": "bf16", "mode_scale": "1.1", "num_class_images": "20",
    "num_train_epochs": "3", "num_validation_images": "2", "optimizer": "AdamW", "output_dir": "somewhere",
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "prior_loss_weight": "0.5", "prodigy_beta3": "0.9",
    "prodigy_decouple": True, "prodigy_safeguard_warmup": True, "prodigy_use_bias_correction": True,
    "random_flip": True, "rank": "8", "repeats": "2", "report_to": "wandb", "resolution": "64",
    "resume_from_checkpoint": "latest", "revision": "main", "sample_batch_size": "2", "scale_lr": True, "seed": "7",
    "train_batch_size": "2", "use_8bit_adam": True, "validation_epochs": "5", "validation_prompt": "b",
    "variant": "fp16", "weighting_scheme": "logit_normal", "with_prior_preservation": True,
    "adam_weight_decay_text_encoder": "1e-3", "cache_dir": "there", "dataset_config_name": "c", "dataset_name": "d",
    "enable_npu_flash_attention": True, "hub_model_id": "a/b", "hub_token": "t", "image_column": "image",
    "image_interpolation_mode": "lanczos", "max_sequence_length": "512", "prior_generation_precision": "bf16",
    "push_to_hub": True, "text_encoder_lr": "5e-6", "train_text_encoder": True, "upcast_before_saving": True,
    "caption_dropout": "0.1", "use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,48",
    # scripts for Stable Diffusion
    "noise_offset": "0.1", "offset_noise": True, "output_kohya_format": True, "pre_compute_text_embeddings": True,
    "set_grads_to_none": True, "snr_gamma": "5", "text_encoder_use_attention_mask": True, "tokenizer_max_length": "77",
    "tokenizer_name": "x", "use_dora": True, "validation_steps": "9", "class_labels_conditioning": "x",
    "validation_scheduler": "x", "skip_save_text_encoder": True, "validation_images": "x",
    "num_dataloader_workers": "1", "clip_skip": "2",
}  # fmt: skip
"""Example values; True for flags without a value."""

FIELDS = {
    name: field for field in dataclasses.fields(DreamBoothSettings) for name in (field.name, *field.metadata["aliases"])
}
HINTS = typing.get_type_hints(DreamBoothSettings)


@pytest.mark.parametrize("name", FLUX)
def test_every_diffusers_flag_is_a_setting_or_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    value = FLUX[name]
    words = [f"--{name}"] if value is True else [f"--{name}", str(value)]
    needed = [word for word in NEEDED if not word.startswith(f"--{name}=")]
    if name == "pretrained_model_name_or_path":
        needed = NEEDED[1:]
    given = settings_from(DreamBoothSettings, [*needed, *words], ignored_flags=IGNORED_FLAGS)
    messages = [record.getMessage() for record in caplog.records]
    if name in IGNORED_FLAGS:
        assert name not in FIELDS, "a setting does something"
        assert messages == [f"--{name} has no effect: {IGNORED_FLAGS[name]}"]
        return
    field = FIELDS[name]
    found = getattr(given, field.name)
    assert not messages
    kind, _ = field_type(HINTS[field.name])
    if is_tuple(HINTS[field.name]):
        assert found == (value,)
    elif kind is str:
        assert found.lower() == str(value).lower()  # AdamW is adamw
    else:
        assert found == kind(value)


def test_reasons_are_one_line() -> None:
    for name, reason in IGNORED_FLAGS.items():
        assert len(reason) > 15 and "\n" not in reason and not reason.endswith("."), name
