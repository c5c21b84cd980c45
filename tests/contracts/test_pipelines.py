"""Every pipeline of this package under the contract. One more pipeline is one more line."""

from __future__ import annotations

import pytest

from mflux_vae_train.pipelines import tiny
from tests.contracts.fake import FakePipeline
from tests.contracts.pipeline_contract import PipelineContract

PIPELINES = {
    "fake": FakePipeline,
    "tiny": tiny.load,
}


class TestPipelines(PipelineContract):
    @pytest.fixture(scope="class", params=PIPELINES.values(), ids=PIPELINES.keys())
    @classmethod
    def pipeline(cls, request):
        return request.param()
