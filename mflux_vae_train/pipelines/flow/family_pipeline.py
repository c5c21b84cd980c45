"""Base of flow pipelines of a `Family` with one language model as text encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.capabilities import Use
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.family import Family
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text.qwen3_prompts import QwenPrompts

P = TypeVar("P", bound="FamilyPipeline")


class FamilyPipeline(FlowPipeline):
    """A pipeline of `family`; `family.networks` are `transformer` and `text_encoder`.

    Args:
        parts: see `flow.files.parts_of`.
        configs: see `Family`.
    """

    adapter_prefix = "transformer"
    family: ClassVar[Family]
    prompts_class: ClassVar[Any]
    """`QwenPrompts` of the family: parts -> prompt encoder."""
    prompts: QwenPrompts

    def __init__(
        self,
        parts: Parts,
        configs: Any,
        *,
        name: str,
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.configs, self.schedule = configs, configs.schedule
        options: Mapping[str, Any] = {"name": name, "snapshot": snapshot, "base_model": base_model}
        super().__init__(parts, self.prompts_class(parts), configs.recommended, **options)

    @classmethod
    def from_pretrained(
        cls: type[P], folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> P:
        """Open a folder. Weights are read when they are first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network; all are listed.
            SettingsError: a configuration needs an unsupported option.
        """
        return files.open_local(cls.family, cls, Path(folder), dtype=dtype, variant=variant)

    def _write(self, folder: Path, dtype: str) -> None:
        files.write(self.family, self.parts, self.configs, folder, dtype)

    @property
    def latent_channels(self) -> int:
        channels: int = self.configs.transformer.in_channels
        return channels

    @abstractmethod
    def _phases(self, work: Workload, text_tokens: int) -> list[Phase]:
        """The phases of a run with so many tokens per prompt."""

    # capabilities.SupportsMemoryControl

    def release(self, *uses: Use) -> None:
        """See `Parts.release`. The encoding of the empty prompt is kept, for guidance."""
        if "prompts" in uses and self.prompts.encoder.loaded is not None:
            self.prompts.unconditional()  # encoded now
        super().release(*uses)

    def skeleton(self) -> nn.Module:
        """The transformer if it is loaded; else its layers with random weights, which are lazy."""
        loaded: nn.Module | None = self._denoiser.loaded
        return loaded or self.family.networks["transformer"].build(self.configs.transformer)

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs, from configurations alone."""
        length = self.prompts.tokens_if_known
        phases = self._phases(work, min(length, work.prompt_tokens or length))
        return files.footprint(self.family, self.configs, phases, self._snapshot)

    # capabilities.SupportsPromptLimit

    @property
    def prompt_limit(self) -> int | None:
        """See `LimitedPromptEncoder.limit`."""
        return self.prompts.limit

    @prompt_limit.setter
    def prompt_limit(self, tokens: int | None) -> None:
        self.prompts.limit = tokens
