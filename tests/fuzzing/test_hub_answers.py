"""A hub whose answers are broken or hostile: one line of an error, and no file outside of the cache."""

from __future__ import annotations

import json
import random
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained import hub
from tests.fuzzing.mutations import mutated

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "README.md"]


def answers(files: list[str]) -> dict[str, bytes]:
    """What the hub says of a repository, and of the files in it, which older clients do not ask for."""
    told = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
    repository = {**told, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": 2, "oid": "e1"} for name in files]
    return {"revision": json.dumps(repository).encode(), "tree": json.dumps(tree).encode()}


class Hub(ThreadingHTTPServer):
    """On this machine. Every file holds the same two bytes.

    Attributes:
        said: its answers, by what is asked.
        asked: paths.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.said: dict[str, bytes] = {}
        self.asked: list[str] = []


class Answering(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = b"{}"
        if self.path.startswith("/api/"):
            content = self.server.said["tree" if "/tree/" in self.path else "revision"]
        self.send_response(200)
        for name, value in {"ETag": '"e1"', "X-Repo-Commit": COMMIT, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def online(server: Hub, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    constants, address = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.said = answers(FILES)
    server.asked.clear()
    return server


def fetched(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        return hub.fetch("owner/name")


def test_a_good_answer_is_followed(online: Hub, tmp_path: Path) -> None:
    found = fetched(tmp_path)
    assert sorted(file.name for file in found.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert any(path.startswith("/api/models/owner/name") for path in online.asked)
    assert not any("README" in path for path in online.asked)


@settings(max_examples=50, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_nothing_comes_of_a_broken_one_but_an_error_of_our_own(online: Hub, seed: int) -> None:
    chance, online.said = random.Random(seed), answers(FILES)
    broken = chance.choice(sorted(online.said))
    online.said[broken] = mutated(online.said[broken], chance)
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetched(Path(folder) / "cache")
        except WeightsError as error:
            assert "\n" not in str(error)
        assert {path.name for path in Path(folder).iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    "name",
    [
        "../../../../vae/config.json",
        "/tmp/vae/config.json",
        "vae/../../../../../../config.json",
        "C:\\vae\\config.json",
    ],
)
def test_no_file_of_a_repository_lies_outside_of_the_cache(name: str, online: Hub, tmp_path: Path) -> None:
    online.said = answers([name, *FILES])
    before = {path for path in tmp_path.rglob("*")}
    outside = Path("/tmp/vae").exists()
    try:
        fetched(tmp_path / "a" / "b" / "c" / "cache")
    except WeightsError as error:
        assert "owner/name" in str(error)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "c" / "cache") for path in made)
    assert Path("/tmp/vae").exists() == outside
