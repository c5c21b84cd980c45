"""The pipelines of this package under the contract. Add a pipeline with one line."""

from __future__ import annotations

import textwrap

import mlx.core as mx
import mlx.nn as nn
import pytest

from mflux_vae_train.pipelines import protocol, tiny
from tests.contracts.fake import FakePipeline
from tests.contracts.pipeline_contract import PipelineContract
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline


def documented_example() -> protocol.DiffusionPipeline:
    """The pipeline in the docstring of `protocol`."""
    _, _, text = protocol.__doc__.partition("\n    class ")
    code, _, _ = text.partition("\nRegister")
    names = {"mx": mx, "nn": nn, "Recommended": protocol.Recommended}
    exec(textwrap.dedent(f"    class {code}"), names)
    return names["Plain"]()


PIPELINES = {
    "fake": lambda folder: FakePipeline(),
    "tiny": lambda folder: tiny.load(),
    "stable diffusion": lambda folder: small_pipeline(folder, "sd1"),
    "sdxl": lambda folder: small_pipeline(folder, "sdxl"),
    "documented example": lambda folder: documented_example(),
}
"""Functions of a folder for files."""


class TestPipelines(PipelineContract):
    @pytest.fixture(scope="class", params=PIPELINES.values(), ids=PIPELINES.keys())
    @classmethod
    def pipeline(cls, request, tmp_path_factory):
        return request.param(tmp_path_factory.mktemp("pipeline"))
