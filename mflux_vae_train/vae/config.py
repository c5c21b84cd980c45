"""Settings of an autoencoder's training. Each field is a flag, a key of the YAML file, and a line of the help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae_train.optimizers import registry
from mflux_vae_train.settings.fields import check_fields, flag

OPTIMIZER_FLAGS = {"adam_beta1": "beta1", "adam_beta2": "beta2", "weight_decay": "weight_decay"}
"""The option of an optimizer that each flag sets, see `optimizers.registry`."""


@dataclass(frozen=True, kw_only=True)
class VAETrainingSettings:
    """Everything that training an autoencoder can be told. Defaults are those of the preset `mnist`.

    An *update* is one change of the weights, an epoch one pass over the training images.

    Raises:
        SettingsError: a value is of the wrong kind or outside its limits, or two settings exclude each other.
    """

    experiment_name: str | None = flag(
        "name of the run (none: made of data, widths and latent size)", None, group="where"
    )
    output_dir: str = flag("the run's folder is checkpoints/<experiment_name> in here", ".", aliases=("outdir",))

    data: str = flag(
        "\"digits\" (drawn here, nothing to download), a folder of images, of MNIST's files or of videos' frames, an"
        " .npz, a file in IDX, or the name of a data set that a package registers",
        "digits",
        aliases=("data_path",),
        group="data",
    )
    data_kind: str | None = flag(
        "what --data is (none: seen by itself)",
        None,
        choices=("digits", "folder", "frames", "mnist", "npz", "registered"),
    )
    data_list: str | None = flag("file that names the videos to take, text or JSON (frames)", None)
    data_count: int = flag("how many images are drawn (digits, registered)", 1200, least=2, aliases=("digits_count",))
    image_size: int = flag("side of the training images in pixels", 28, least=4)
    in_channels: int = flag("channels of the images: 1 for grey, 3 for colour", 1, aliases=("nimg_channels",))
    val_share: float = flag("share of the images held out, where the data has no test split", 0.1, above=0, below=1)
    augment_flip: bool = flag("mirror half of the training images", False)
    augment_shift: int = flag("move training images by up to this many pixels", 0, least=0)

    network: str = flag(
        "flat: latents are vectors; kl: Stable Diffusion's autoencoder; plain: residual blocks without norms",
        "flat",
        choices=("flat", "kl", "plain"),
        group="network",
    )
    hidden_dims: tuple[int, ...] = flag("width of each level; each halves the image", (32, 64, 128, 256), least=1)
    max_filters: int | None = flag("widths M/4, M/2, M in place of --hidden_dims", None, least=4)
    latent_dim: int = flag(
        "length of a latent vector, or a spatial latent's channels", 128, least=1, aliases=("latent_dims",)
    )
    batch_norm: bool = flag("batch normalisation (flat)", True)
    upsampling: str = flag(
        "transposed convolutions, or repeated pixels and a convolution (flat)",
        "transposed",
        choices=("transposed", "repeat"),
    )
    last_conv: bool = flag("one more convolution after the last level (flat)", True)
    output: str = flag("what follows at last (flat)", "sigmoid", choices=("sigmoid", "tanh", "linear"))
    layers_per_block: int = flag("residual blocks of a level (kl)", 2, least=1)
    network_config: str | None = flag(
        "a config.json, or a YAML with a ddconfig, that describes the network in place of the flags above", None
    )
    init: str = flag(
        "weights at first; orthogonal: orthogonal kernels, residual branches at zero, a narrow posterior, with which a"
        " small network learns in minutes",
        "default",
        choices=("default", "orthogonal"),
    )
    init_from: str | None = flag("an autoencoder to start from: a folder, a weights file, a hub id", None)
    train: str = flag("decoder: latents stay what they are", "all", choices=("all", "decoder"))

    loss_type: str = flag(
        "vae: beta times KL; beta_vae: beta rises from --beta_start to --beta_end; tc: total correlation times beta",
        "vae",
        choices=("vae", "beta_vae", "tc"),
        group="loss",
    )
    reconstruction_loss_type: str = flag("error of an image", "mse", choices=("mse", "l1", "bce"))
    reduction: str = flag("the error's sum over an image, or its mean", "sum", choices=("sum", "mean"))
    beta: float = flag("weight of KL, or with tc of total correlation", 1.0, least=0, aliases=("kld_weight",))
    beta_start: float = flag("beta at first (beta_vae)", 0.0, least=0)
    beta_end: float = flag("beta after --beta_steps (beta_vae)", 1.0, least=0)
    beta_steps: int = flag("updates of the rise, or of a cycle (beta_vae)", 1000, least=1)
    beta_cyclical: bool = flag("beta rises again and again, in the first half of each cycle (beta_vae)", False)
    gamma: float = flag("weight of the dimension-wise KL (tc)", 1.0, least=0)
    free_bits: float = flag("nats of KL per latent unit that cost nothing", 0.0, least=0)
    lpips: tuple[str, ...] | None = flag(
        "weights of LPIPS, VGG16's and those of its channels, in two files or one: adds the perceptual distance", None
    )
    lpips_weight: float = flag("weight of LPIPS", 1.0, least=0)
    disc_start: int | None = flag("update from which a patch discriminator counts (none: without)", None, least=0)
    disc_weight: float = flag("weight of the discriminator", 0.5, least=0)

    batch_size: int = flag("images in a micro-batch", 128, least=1, aliases=("batchsize",), group="how much, how fast")
    gradient_accumulation_steps: int = flag("micro-batches in an update", 1, least=1)
    num_epochs: int = flag("passes over the training images", 100, least=1, aliases=("epochs",))
    optimizer: str = flag(registry.help_text(registry.with_given_rate()), "adamw", choices=registry.with_given_rate())
    learning_rate: float = flag("peak learning rate", 1e-3, above=0, aliases=("lr",))
    lr_scheduler: str = flag(
        "shape after warm-up; exponential: times --lr_gamma every epoch, step: every --lr_step_epochs",
        "constant",
        choices=("constant", "linear", "cosine", "exponential", "step"),
    )
    lr_gamma: float = flag("factor of the schedules exponential and step", 0.95, above=0, most=1)
    lr_step_epochs: int = flag("epochs between the steps of the schedule step", 30, least=1)
    lr_warmup_steps: int = flag("updates of linear warm-up", 0, least=0)
    weight_decay: float = flag("weight decay", 1e-4, least=0)
    adam_beta1: float = flag("decay of the first moment", 0.9, least=0, below=1)
    adam_beta2: float = flag("decay of the second moment", 0.999, least=0, below=1)
    max_grad_norm: float | None = flag("clip gradients to this global norm (none: not)", 1.0, above=0)
    ema_decay: float = flag("moving average of the weights, which is what is saved; 0 for none", 0.0, least=0, below=1)
    mixed_precision: bool = flag("compute in bfloat16, keep weights in float32 (Metal and CUDA)", False)
    gradient_checkpointing: bool = flag("compute blocks again in the backward pass: less memory, more time", False)

    val_every: int = flag("epochs between validations", 1, least=1, group="watching and resuming")
    early_stopping: int | None = flag(
        "end after this many validations without a better loss (none: never)", None, least=1
    )
    samples_every: int | None = flag(
        "epochs between grids of reconstructions and samples (none: at the end)", 10, least=1
    )
    log_images_every_n_steps: int | None = flag("updates between further ones, where epochs are long", None, least=1)
    save_every: int = flag("epochs between checkpoints", 1, least=1)
    save_every_n_steps: int | None = flag("updates between further ones, where epochs are long", None, least=1)
    tensorboard: bool = flag("write events for TensorBoard (extra 'tensorboard')", False)
    allow_changes: bool = flag("continue a run although its data, weights or settings have changed", False)
    seed: int = flag("every random draw is a function of it", 0, least=0, below=2**32)
    cpu: bool = flag("compute on the CPU", False)
    dry_run: bool = flag("say what would happen, try one batch, and stop", False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.in_channels not in (1, 3):
            raise SettingsError(f"--in_channels is {self.in_channels}; 1 or 3 is allowed")
        if self.network_config and self.init_from:
            raise SettingsError("--network_config and --init_from: give one of them")
        if self.lpips and len(self.lpips) > 2:
            raise SettingsError(f"--lpips: {len(self.lpips)} files are given; VGG16's and its channels' are two")
        if self.init_from and self.init != "default":
            raise SettingsError(f"--init {self.init} and --init_from: give one of them")
        if self.max_filters is not None and self.max_filters % 4:
            raise SettingsError(f"--max_filters is {self.max_filters}; a multiple of 4 is allowed")
        if self.experiment_name is not None and not self.experiment_name.strip("./ "):
            raise SettingsError(f"--experiment_name is {self.experiment_name!r}; a name is allowed")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the network's levels."""
        most = self.max_filters
        return self.hidden_dims if most is None else (most // 4, most // 2, most)

    @property
    def name(self) -> str:
        """Of the run."""
        data = self.data.rstrip("/").rpartition("/")[2].partition(".")[0]
        return self.experiment_name or f"vae_{data}_filters_{max(self.widths):04}_dims_{self.latent_dim:04}"


_SEED_004 = {
    "image_size": 256,
    "in_channels": 3,
    "hidden_dims": (64, 128, 256, 512, 1024),
    "latent_dim": 256,
    "output": "tanh",
    "reduction": "mean",
    "beta": 1e-4,
    "batch_size": 64,
    "num_epochs": 200,
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "lr_scheduler": "exponential",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mnist": {},
    "beta": {"loss_type": "beta_vae", "beta_end": 4.0},
    "tc": {"loss_type": "tc", "beta": 4.0},
    "mlx-mnist": {
        "image_size": 64,
        "hidden_dims": (16, 32, 64),
        "latent_dim": 8,
        "upsampling": "repeat",
        "last_conv": False,
        "num_epochs": 50,
        "weight_decay": 0.01,
        "max_grad_norm": None,
    },
    # latent-diffusion's first stage: |x - x'| + LPIPS + 1e-6 KL, a discriminator late; rate 4.5e-6 per image
    "kl-f8": {
        "network": "kl",
        "image_size": 256,
        "in_channels": 3,
        "hidden_dims": (128, 256, 512, 512),
        "latent_dim": 4,
        "reconstruction_loss_type": "l1",
        "beta": 1e-6,
        "disc_start": 50001,
        "batch_size": 1,
        "gradient_accumulation_steps": 12,
        "optimizer": "adam",
        "learning_rate": 5.4e-5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "gradient_checkpointing": True,
    },
    "vanilla-256": _SEED_004,
    "plain": {
        "network": "plain",
        "image_size": 64,
        "in_channels": 3,
        "hidden_dims": (64, 128, 256, 512),
        "latent_dim": 4,
        "reduction": "mean",
        "beta": 1e-6,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "ema_decay": 0.999,
    },
}
"""Each a recipe that is in use, as what differs from `mnist`."""


def preset(name: str, **changes: Any) -> VAETrainingSettings:
    """A preset's settings, with changes.

    Raises:
        SettingsError: there is no such preset, or a change that is none.
    """
    if name not in PRESETS:
        raise SettingsError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return settings_from_dict({**PRESETS[name], **changes})


def settings_from_dict(values: Mapping[str, Any]) -> VAETrainingSettings:
    """Settings from a dictionary of some or all of them.

    Raises:
        SettingsError: an unknown name, or what `VAETrainingSettings` refuses.
    """
    known = {name: f.name for f in dataclasses.fields(VAETrainingSettings) for name in (f.name, *f.metadata["aliases"])}
    if unknown := [name for name in values if name not in known]:
        hint = "".join(did_you_mean(str(name), known) for name in unknown) or f"; there are {', '.join(known)}"
        raise SettingsError(f"no settings: {', '.join(map(repr, unknown))}{hint}")
    return VAETrainingSettings(**{known[name]: value for name, value in values.items()})


def get_default_config() -> dict[str, Any]:
    """All settings of the preset `mnist`, to be changed and given to `VAETrainer`."""
    return dataclasses.asdict(preset("mnist"))


def get_beta_vae_config() -> dict[str, Any]:
    """All settings of the preset `beta`, to be changed and given to `VAETrainer`."""
    return dataclasses.asdict(preset("beta"))
