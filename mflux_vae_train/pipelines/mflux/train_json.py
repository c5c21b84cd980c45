"""Settings files of mflux-train (0.24: ``data``; releases before 0.15: ``examples``) as settings of this trainer.

mflux trains each image in its aspect ratio, without images of a class, and leaves the learning rate constant unless the
file says otherwise; so does a translated file.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.formatting import first_names
from mflux_vae.utils.paths import expand
from mflux_vae.utils.text_files import Table

logger = logging.getLogger(__name__)

_DEFAULTS = {
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "prior_preservation": "none",
}

_NAMES: Mapping[str, str | None] = {
    "model": "model",
    "model_path": "model",
    "seed": "seed",
    "guidance": "guidance",
    "quantize": "quantize",
    "steps": "num_inference_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_resolution": "resolution",
    "training_loop.num_epochs": "num_train_epochs",
    "training_loop.batch_size": "train_batch_size",
    "training_loop.timestep_type": "weighting_scheme",
    "optimizer.name": "optimizer",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.lr_schedule": "lr_scheduler",
    "optimizer.lr_warmup_steps": "lr_warmup_steps",
    "optimizer.max_grad_norm": "max_grad_norm",
    "optimizer.gradient_accumulation_steps": "gradient_accumulation_steps",
    "optimizer.optimizer_params.weight_decay": "adam_weight_decay",
    "optimizer.optimizer_params.betas": "adam_beta1",
    "optimizer.optimizer_params.eps": "adam_epsilon",
    "checkpoint.output_path": "output_dir",
    "checkpoint.save_frequency": "checkpointing_steps",
    "monitoring.generate_image_frequency": "validation_steps",
    "save.output_path": "output_dir",
    "save.checkpoint_frequency": "checkpointing_steps",
    "instrumentation.generate_image_frequency": "validation_steps",
    "instrumentation.validation_prompt": "validation_prompt",
    **dict.fromkeys(["low_ram", "cache_limit_gb", "optimizer.lr_total_steps", "optimizer.state_path"]),
    **dict.fromkeys(f"training_loop.{name}" for name in ("timestep_low", "timestep_high", "iterator_state_path")),
    **dict.fromkeys(f"monitoring.{name}" for name in ("preview_width", "preview_height", "smooth_loss")),
    **dict.fromkeys(["monitoring.plot_frequency", "monitoring.smooth_loss_window", "instrumentation.plot_frequency"]),
    **dict.fromkeys(["optimizer.optimizer_params.bias_correction", "lora_layers.state_path", "statistics.state_path"]),
}
"""Name in the file, with its section -> setting, or None if there is no counterpart."""

_READ_APART = ("data", "examples", "width", "height", "lora_layers")
_SECTIONS = {part for name in _NAMES for part in (name.rpartition(".")[0],) if part} - {"lora_layers"}
_EVERY = ("checkpointing_steps", "validation_steps")
"""Settings that count optimizer updates here and micro-batches there."""

_WEIGHT_DECAY = {"adamw": 0.01}
"""Of MLX's optimizers, if the file has none; 0 for the others."""

_KLEIN = {"klein": "klein", "klein-base": "klein-base", "base": "klein-base"}
_MODELS = {
    **{
        f"{start}{name}-{size}": f"black-forest-labs/FLUX.2-{kind}-{size.upper()}"
        for start in ("flux2-", "")
        for name, kind in _KLEIN.items()
        for size in ("4b", "9b")
    },
    "flux2-klein": "black-forest-labs/FLUX.2-klein-4B",
    **dict.fromkeys(["z-image", "zimage"], "Tongyi-MAI/Z-Image"),
    **dict.fromkeys(["z-image-turbo", "zimage-turbo"], "Tongyi-MAI/Z-Image-Turbo"),
    **dict.fromkeys(["krea-dev", "dev-krea"], "black-forest-labs/FLUX.1-Krea-dev"),
}
"""mflux's names for models whose names here differ or mean another model."""

_IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


def translate(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """The content of a file of mflux-train under this trainer's names; that of other files as it is.

    Names without a counterpart are logged as one warning.

    Raises:
        SettingsError: unknown names, or a training that this trainer does not have.
    """
    if not any(isinstance(content.get(name), Mapping) for name in ("training_loop", "lora_layers")):
        return content
    given = {name: value for name, value in _flat(content, path) if value is not None}
    if "model_path" in given:  # the weights; the other names only the architecture
        given.pop("model", None)
    found, unused = Table(_DEFAULTS), []
    for name, value in given.items():
        setting = _NAMES[name]
        if setting is None or (setting == "weighting_scheme" and value != "sigmoid"):
            unused += [name] if value is not False else []
            continue
        found[setting] = value
        top = name.partition(".")[0]
        if isinstance(content, Table) and top in content.lines:
            found.lines[setting] = content.lines[top]
    found |= _optimizer(found, given, unused) | _images(content, path, unused) | _layers(content, path, unused)
    found["num_validation_images"] = int(bool(content.get("monitoring") or content.get("instrumentation")))
    if "weighting_scheme" in found:
        found["weighting_scheme"] = "logit_normal"
    if isinstance(model := found.get("model"), str):
        found["model"] = _MODELS.get(model.lower(), model)
    for name in _EVERY:
        if isinstance(found.get(name), int) and isinstance(found["gradient_accumulation_steps"], int):
            found[name] = max(1, -(-found[name] // max(1, found["gradient_accumulation_steps"])))
    if unused:
        logger.warning("%s: no counterpart here, not used: %s", path, ", ".join(unused))
    return found


def _flat(content: Mapping[Any, Any], path: Path, section: str = "") -> Iterator[tuple[str, Any]]:
    """Names with their sections, and values."""
    known = [name.removeprefix(section) for name in (*_NAMES, *_SECTIONS, *_READ_APART) if name.startswith(section)]
    for key, value in content.items():
        name = f"{section}{key}"
        if name in _SECTIONS and (value is None or isinstance(value, Mapping)):
            yield from _flat(value or {}, path, f"{name}.")
        elif name in _NAMES:
            yield name, value
        elif name not in _READ_APART:
            raise SettingsError(f"{path}: unknown setting {name!r}{did_you_mean(str(key), known)}")


def _optimizer(found: Mapping[str, Any], given: Mapping[str, Any], unused: list[str]) -> dict[str, Any]:
    """Settings of the optimizer that depend on each other, and on MLX's defaults."""
    settings: dict[str, Any] = {}
    name = settings["optimizer"] = str(found.get("optimizer", "adamw")).lower()
    settings["adam_weight_decay"] = found.get("adam_weight_decay", _WEIGHT_DECAY.get(name, 0.0))
    betas = found.get("adam_beta1")
    if isinstance(betas, Sequence) and len(betas) == 2:
        settings["adam_beta1"], settings["adam_beta2"] = betas
    schedule = found["lr_scheduler"]
    if schedule != "cosine" or not given.get("optimizer.lr_total_steps"):  # as mflux reads it
        settings["lr_scheduler"] = "constant"
        if schedule != "constant":
            unused.append(f"optimizer.lr_schedule {schedule} (constant: mflux reads cosine with lr_total_steps alone)")
    else:
        unused.remove("optimizer.lr_total_steps")
        unused.append(f"optimizer.lr_total_steps {given['optimizer.lr_total_steps']} (the cosine ends with the run)")
    return settings


def _images(content: Mapping[Any, Any], path: Path, unused: list[str]) -> dict[str, Any]:
    """Folder of the images, their size, and the prompt of the first one."""
    examples = content.get("examples")
    folder = content.get("data") if examples is None else examples.get("path") if isinstance(examples, Mapping) else 0
    if not isinstance(folder, str):
        raise SettingsError(f"{path}: neither data nor examples.path is the folder of the images")
    place = path.parent / Path(expand(folder))
    files = sorted(file for file in place.glob("*") if file.suffix.lower() in _IMAGES)
    names = {file.stem for file in files}
    if any(name.endswith("_out") and f"{name.removesuffix('_out')}_in" in names for name in names):
        raise SettingsError(f"{path}: {place} has pairs *_in and *_out, which train editing; here a subject is trained")
    settings: dict[str, Any] = {"instance_data_dir": str(place)}
    texts = [file.with_suffix(".txt") for file in files]
    prompts = [text.read_text(encoding="utf-8", errors="replace").strip() for text in texts[:1] if text.is_file()]
    if examples is not None:
        listed = [one for one in examples.get("images") or () if isinstance(one, Mapping)]
        files_listed = [str(one.get("image")) for one in listed]
        if place.is_dir() and (missing := [name for name in files_listed if not (place / name).is_file()]):
            raise SettingsError(f"{path}: examples.images names {first_names(missing)}, which {place} does not have")
        prompts = list(dict.fromkeys(str(one["prompt"]) for one in listed if one.get("prompt") is not None))
        if len(prompts) > 1 and not all(text.is_file() for text in texts):
            raise SettingsError(f"{path}: examples.images has {len(prompts)} prompts; write each to NAME.txt beside it")
        if {file.name for file in files} != {Path(name).name for name in files_listed}:
            unused.append("examples.images (all images in its folder are used)")
    else:
        settings["use_aspect_ratio_buckets"] = True
        previews = sorted(place.glob("preview*.txt"))
        shown = [preview.read_text(encoding="utf-8", errors="replace").strip() for preview in previews]
        settings |= {"validation_prompt": shown} if shown else {}
    settings |= {"instance_prompt": prompts[0]} if prompts else {}
    width, height, most = (content.get(name) for name in ("width", "height", "max_resolution"))
    if isinstance(most, int):
        settings["resolution"] = max(most // 16, 1) * 16
    if width is not None and width == height:
        settings["resolution"] = width
    elif width is not None and height is not None:
        settings["aspect_ratio_buckets"] = f"{height},{width}"
    return settings


def _layers(content: Mapping[Any, Any], path: Path, unused: list[str]) -> dict[str, Any]:
    """The adapted layers, rank and alpha."""
    layers = content.get("lora_layers") or {}
    try:
        found = [*_targets(layers)]
        patterns = [pattern for target in found for pattern in _expanded(*target[:2])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}: lora_layers is not as mflux-train writes it ({error!r})") from error
    settings: dict[str, Any] = {"lora_layers": ",".join(patterns)} if patterns else {}
    for index, name in ((2, "rank"), (3, "lora_alpha")):
        values = Counter(target[index] for target in found).most_common()
        if len(values) > 1:
            others = ", ".join(str(value) for value, _ in values[1:])
            unused.append(f"lora_layers.{name} {others} (all layers have {values[0][0]})")
        if values and values[0][0] is not None:
            settings[name] = values[0][0]
    return settings


def _targets(layers: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Path with ``{block}``, its blocks, rank and alpha of each target."""
    for target in layers.get("targets") or ():
        yield target["module_path"], target.get("blocks"), target["rank"], target.get("alpha")
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        if old := layers.get(kind):
            for layer in old["layer_types"]:
                yield f"{kind}.{{block}}.{layer}", old["block_range"], old["lora_rank"], None
    if unknown := layers.keys() - {"targets", "state_path", "transformer_blocks", "single_transformer_blocks"}:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")


def _expanded(layer: str, blocks: Mapping[str, Any] | None) -> list[str]:
    """Patterns of the layers: blocks 0 to 11 are ``[0-9]`` and ``1[01]``, without the hyphen."""
    # diffusers' names, which are those here
    layer = re.sub(r"^(transformer_blocks\..*\.attn\.to_out|.*\.ff(_context)?\.linear[12])$", _renamed, layer)
    if blocks is None:
        return [layer]
    indices = blocks["indices"] if blocks.get("indices") is not None else range(blocks["start"], blocks["end"])
    units: dict[str, str] = {}
    for index in sorted(indices):
        units[str(int(index))[:-1]] = units.get(str(int(index))[:-1], "") + str(int(index))[-1]
    return [layer.format(block=f"{tens}[{digits}]") for tens, digits in units.items()]


def _renamed(match: re.Match[str]) -> str:
    path = match[0]
    if path.endswith("to_out"):
        return f"{path}.0"
    return f"{path[: -len('linear1')]}net.{'0.proj' if path.endswith('1') else '2'}"
