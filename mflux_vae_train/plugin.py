"""The entry point ``dreambooth`` of the group ``mflux.plugins``.

A host is any program with a diffusion pipeline. It trains the pipeline object with three lines:

    (entry,) = importlib.metadata.entry_points(group="mflux.plugins", name="dreambooth")
    DreamBooth = entry.load()
    DreamBooth(pipeline).train(DreamBooth.Settings(model="mine", ...))

The contract:

- `pipeline` has the members of `DiffusionPipeline`, without inheriting from it. `PluginError` lists missing ones. A
  model object of mflux is opened as one, and draws the subject afterwards: see `mflux_vae_train.pipelines.mflux`.
- `DreamBooth.Settings` has a field for every flag of ``mflux-train-dreambooth``. The pipeline's `recommended` provides
  values for fields that are None. `model` is only a label here.
- `train` returns a `TrainingResult` with the path of the adapter, in PEFT's naming under the pipeline's
  `adapter_prefix`. Called again with the same settings it continues an interrupted run.
- Wrong input raises `InputError`, a failure `RunError`; both are subclasses of `DreamBooth.Error`, with messages of one
  line. SIGINT and SIGTERM save a checkpoint and raise `Interrupted`, a KeyboardInterrupt and no `DreamBooth.Error`.
- ``train(settings, on_progress=...)`` calls a function with a `monitoring.progress.Progress`: phase, update, total,
  loss, seconds left.
- The loggers ``mflux_vae_train`` and ``mflux_vae`` receive all messages; ``logging.basicConfig(level=logging.INFO)``
  shows them. Without any logging, warnings go to standard error. A progress bar is printed only on a terminal.
"""

from __future__ import annotations

from mflux_vae.errors import InputError, MfluxVaeError, PluginError, RunError
from mflux_vae.runtime import device  # noqa: F401  (first: one clear error where MLX cannot be imported)
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth, TrainingResult
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline, Recommended

__all__ = [
    "Conditioning",
    "DiffusionPipeline",
    "DreamBooth",
    "DreamBoothSettings",
    "InputError",
    "Interrupted",
    "MfluxVaeError",
    "PluginError",
    "Recommended",
    "RunError",
    "TrainingResult",
]
