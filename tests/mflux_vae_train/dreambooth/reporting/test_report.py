"""report.html of whole runs on the fake pipeline: it shows what was measured and loads nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mflux_vae.errors import TrainingError
from mflux_vae.images import load_image, save_image
from mflux_vae.utils.formatting import GB
from mflux_vae_train.dreambooth import train as train_module
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.reporting import monitor
from mflux_vae_train.dreambooth.reporting.report import Report
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.training.hooks import peak_memory, read_metrics
from tests.contracts.fake import FakePipeline
from tests.helpers import browser
from tests.helpers.html import Page
from tests.mflux_vae_train.dreambooth.conftest import subject

EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run with several prompts, and with texts that break a page without escaping."""
    folder = tmp_path_factory.mktemp("run")
    for index in range(5):
        save_image(folder / "instance" / f"picture-{index}.png", subject(index))
    save_image(folder / "instance" / "x<b>&y.png", subject(7))
    (folder / "instance" / "x<b>&y.txt").write_text(f"a sks dog {EVIL}", encoding="utf-8")
    (folder / "instance" / "photo.psd").write_bytes(b"8BPS\0\1")
    train(folder / "instance", folder / "out")
    return folder / "out"


def train(instance_dir, folder, pipeline=None, **changes):
    given = {
        "model": "fake",
        "instance_data_dir": str(instance_dir),
        "instance_prompt": f"a photo of sks dog {EVIL}",
        "class_prompt": "a photo of a dog",
        "output_dir": str(folder),
        "max_train_steps": 6,
        "num_class_images": 5,
        "validation_prompt": ("a sks dog", EVIL),
        "num_validation_images": 2,
        "validation_steps": 3,
        "lr_warmup_steps": 1,
        **changes,
    }
    return DreamBooth(pipeline or FakePipeline()).train(DreamBoothSettings(**given))


def page_of(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def pixels(image: dict[str, str]) -> np.ndarray:
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_page_loads_nothing_and_escapes_text(out):
    page = page_of(out)
    for tag, attributes in page.elements:
        assert not {"onclick", "onload", "onerror", "srcset", "action"} & attributes.keys()
        for name in ("src", "href"):
            if tag != "dialog" and name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), attributes[name][:60]
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    scripts = [text for tag, text in page.texts if tag == "script"]
    assert len(page.of("script")) == len(scripts) and not any("alert" in text for text in scripts)
    assert f"a photo of sks dog {EVIL}" in page.text() and "x<b>&y.png" in page.text()
    assert not {path.name for path in out.iterdir() if "partial" in path.name}


def test_page_lists_what_is_not_used(out):
    log = (out / "train.log").read_text(encoding="utf-8").splitlines()
    warnings = [line.partition(" WARNING ")[2] for line in log if " WARNING " in line]
    shown = [text for tag, text in page_of(out).texts if tag == "li"]
    assert {*warnings} <= {*shown}
    for word in ("photo.psd", "5 of 6 images have no caption"):
        assert sum(word in line for line in warnings) == 1


def test_page_has_all_previews_and_training_images(out):
    page = page_of(out)
    images = page.of("img")
    for update, label in ((0, "untrained"), (3, "step 3"), (6, "step 6")):
        sheet = load_image(out / "samples" / f"step-{update:05d}.png")
        shown = [pixels(image) for image in images if image["alt"].startswith(f"{label},")]
        if update == 6:  # the last previews are also shown above the others
            np.testing.assert_array_equal(shown[0:2] + shown[4:6], shown[2:4] + shown[6:8])
            shown = shown[2:4] + shown[6:8]
        rows = [np.concatenate(shown[:2], axis=1), np.concatenate(shown[2:], axis=1)]
        np.testing.assert_array_equal(np.concatenate(rows), sheet)
    named = {image.get("title") for image in images}
    assert {f"picture-{index}.png" for index in range(5)} < named and "class-00004.png" in named
    assert "a photo of a dog: 5 images" in page.text()


def test_curves_equal_the_metrics(out):
    records = read_metrics(out / "metrics.jsonl")
    curves = {
        curve["name"]: curve
        for tag, text in page_of(out).texts
        if tag == "script" and text.startswith("[")
        for curve in json.loads(text)
    }
    metrics = {"instance": "instance_loss", "prior": "prior_loss", "norm": "grad_norm", "rate": "learning_rate"}
    for name, metric in {**metrics, "change": "update_size"}.items():
        np.testing.assert_allclose(curves[name]["values"], [record[metric] for record in records], rtol=1e-4)
        assert curves[name]["updates"] == [1, 2, 3, 4, 5, 6]
    measured = {name for record in records for name in record if name.startswith("loss_noise_")}
    levels = {name for name in curves if name.endswith("% noise")}
    assert len(measured) == len(levels) > 1


def test_page_marks_changed_settings_and_has_the_log(out):
    page = page_of(out)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert '<tr class=set title="updates between previews' in html and '<tr title="micro-batches in an update' in html
    text = page.text()
    assert all(words in text for words in ("finished", "validation_steps", "6 instance images", "saved"))


def test_failed_run_shows_the_error(instance_dir, tmp_path, monkeypatch):
    pipeline = FakePipeline()
    whole = pipeline.predict if hasattr(pipeline, "predict") else None
    assert whole is not None

    def poisoned(*args, **options):
        predicted = whole(*args, **options)
        return predicted._replace(prediction=predicted.prediction * float("nan"))

    monkeypatch.setattr(pipeline, "predict", poisoned)
    with pytest.raises(TrainingError, match="learning_rate"):
        train(instance_dir, tmp_path / "out", pipeline)
    page = page_of(tmp_path / "out")
    assert "stopped" in page.text() and "update 1: loss is nan" in page.text()


def test_new_run_shows_no_metrics_of_an_earlier_process(instance_dir, tmp_path, monkeypatch):
    pages, start, written = [], train_module.run_folder.start, Report.write

    def started(folder, *given):  # with lines of a process that was killed before its first checkpoint
        start(folder, *given)
        folder.metrics.write_text('{"update": 1, "loss": 9, "learning_rate": 1, "grad_norm": 1, "seconds": 1}\n')

    def write(self, state, **options):
        written(self, state, **options)
        pages.append(page_of(tmp_path / "out").text())

    monkeypatch.setattr(train_module.run_folder, "start", started)
    monkeypatch.setattr(Report, "write", write)
    train(instance_dir, tmp_path / "out")
    assert "Training curves" not in pages[0] and "Training curves" in pages[-1]


def test_page_that_cannot_be_written_does_not_end_the_run(instance_dir, tmp_path, monkeypatch, caplog):
    def broken(self, *_):
        raise OSError("no space left")

    monkeypatch.setattr(Report, "_page", broken)
    assert train(instance_dir, tmp_path / "out").updates == 6
    assert "no space left" in caplog.text


@pytest.mark.filterwarnings("ignore")  # warnings of TensorBoard
def test_tracker_receives_the_same_numbers_and_images(instance_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(instance_dir, tmp_path / "out", report_to="tensorboard", validation_prompt=("a sks dog", "a dog"))
    seen = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    seen.Reload()
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for name in ("loss", "update_size", "prior_loss"):
        found = [(one.step, one.value) for one in seen.Scalars(f"train/{name}")]
        assert found == [(record["update"], pytest.approx(record[name], rel=1e-5)) for record in records]
    for prompt in ("a sks dog", "a dog"):
        assert [one.step for one in seen.Images(f"preview: {prompt}")] == [0, 3, 6]


CHROMIUM = browser.find()
LOOK = """
addEventListener("load", () => {
  const plots = [...document.querySelectorAll(".plot")], box = plots[0].getBoundingClientRect();
  const point = {clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true};
  plots[0].dispatchEvent(new PointerEvent("pointermove", point));
  const slider = document.querySelector(".scrub input");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const seen = {
    tip: plots[0].querySelector(".tip").textContent,
    cursors: plots.filter((plot) => !plot.querySelector(".cursor").hidden).length,
    plots: plots.length,
    scene: document.querySelector(".scene img").alt,
    wide: document.documentElement.scrollWidth - innerWidth,
    outside: plots.filter((plot) => plot.querySelector(".average").getBBox().width <= 0).length,
  };
  document.title = JSON.stringify(seen);
});
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_values_under_the_pointer(out, tmp_path, width):
    html = (out / "report.html").read_text(encoding="utf-8")
    looked = tmp_path / "looked.html"
    looked.write_text(html.replace("</body>", f"<script>{LOOK}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--window-size={width},900", "--dump-dom", looked.as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    (title,) = [text for tag, text in Page(done.stdout).texts if tag == "title"]
    seen = json.loads(title)
    assert seen["tip"].startswith("update 3") and "instance" in seen["tip"] and "prior" in seen["tip"]
    assert seen["cursors"] == seen["plots"] > 5 and seen["outside"] == 0
    assert seen["scene"].startswith("untrained") and seen["wide"] <= 0


def test_all_outputs_agree_on_the_peak_memory(short_run, caplog, tmp_path) -> None:
    with caplog.at_level(logging.INFO):
        DreamBooth(FakePipeline()).train(short_run(prior_preservation="none", max_train_steps=2))
    (last,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("saved ")]
    logged = re.search(r"\(peak memory (\S+ [MG]B)\)", last)[1]
    report = (tmp_path / "out" / "report.html").read_text()
    assert re.search(rf"Peak memory.{{0,80}}{re.escape(logged)}.{{0,80}}allocated by MLX", report, re.DOTALL)
    records = [{"memory_gb": 7.25}, {"memory_gb": 0.1}]
    assert peak_memory(records) == 7.25 * GB and peak_memory([]) == mx.get_peak_memory()


@pytest.mark.parametrize("reason", [None, "this machine has no screen"])
def test_the_report_is_alive_and_opened_on_request(out, tmp_path, monkeypatch, caplog, reason):
    seen, write = [], Report.write

    def opens(path):
        seen.append(("opened", 'class="state running"' in path.read_text()))
        return reason

    def writes(self, state, **named):
        seen.append((state, named["update"]))
        assert named["expected"] >= 0
        write(self, state, **named)

    monkeypatch.setattr(monitor, "open_page", opens)
    monkeypatch.setattr(monitor, "REPORT_INTERVAL", 0.0)
    monkeypatch.setattr(Report, "write", writes)
    changes = {"max_train_steps": 2, "num_validation_images": 0, "prior_preservation": "none"}
    train(out.parent / "instance", tmp_path / "out", open_report=True, **changes)
    assert seen[:4] == [("running", 0), ("opened", True), ("running", 1), ("running", 2)]
    assert seen[-1] == ("finished", 2)
    assert sum("--open_report" in record.message for record in caplog.records) == (reason is not None)
    assert "data-written" not in (tmp_path / "out" / "report.html").read_text().partition("<main>")[0]
