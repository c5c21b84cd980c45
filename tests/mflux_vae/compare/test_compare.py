"""``mflux-vae compare``: the numbers are those of the models, the sheet shows them, pairs are made as it is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import VAE
from mflux_vae.compare import comparison, report
from mflux_vae.compare.codecs import ImageCodec, PairCodec, open_codec
from mflux_vae.compare.labels import caption, drawable
from mflux_vae.compare.measuring import error_map
from mflux_vae.errors import SettingsError
from mflux_vae.images import load_image, save_image
from mflux_vae.metrics import image as metrics
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained import loading
from tests.conftest import Run
from tests.mflux_vae.small_models import drawn, small_kl, small_tiny

LAQ = Path(__file__).parents[1] / "golden/laq"
SIDE = 32


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A folder, a file with vectors of grey images of another size, and LAPA's."""
    VAE(network=small_kl()).save_pretrained(tmp_path / "spatial")
    flat = FlatAutoencoder(FlatConfig(hidden_dims=(4, 8), latent_dim=6, image_size=20))
    loading.save_network(drawn(flat), tmp_path / "runs/grey/best_model.safetensors")
    return {
        "spatial": tmp_path / "spatial",
        "grey": tmp_path / "runs/grey/best_model.safetensors",
        "laq": LAQ / "vae.pt",
    }


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Blots of colour; not noise, which would look the same everywhere."""
    draw = np.random.default_rng(0)
    made = []
    for name, size in (("one/0.png", (40, 64)), ("two/0.png", (32, 32)), ("two/1.jpg", (80, 33))):
        blots = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        save_image(tmp_path / name, blots.repeat(-(-size[0] // 4), 0).repeat(-(-size[1] // 4), 1)[: size[0], : size[1]])
        made.append(tmp_path / name)
    return made


def compared(run: Run, models: dict[str, Path], photos: Sequence[Path], output: Path, *flags: object) -> dict[str, Any]:
    configs = ("--config", "-", "--config", "-", "--config", LAQ / "config.json")
    status, stdout, err = run(
        "compare", *models.values(), "--images", *photos, *configs, "--size", SIDE, "--output", output, *flags
    )
    assert status == 0, err
    answer: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    assert "--json" in flags or all(model["name"] in stdout for model in answer["models"])
    return answer


def test_numbers_are_those_of_the_models(run: Run, models: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    answer = compared(run, models, photos, tmp_path / "out")
    assert answer["size"] == SIDE and [model["name"] for model in answer["models"]] == list(models)
    vae, found = VAE.from_pretrained(models["spatial"]), answer["models"][0]
    pictures = [load_image(photo, resolution=SIDE).transpose(2, 0, 1)[None] for photo in photos]
    made = [vae(mx.array(picture)) for picture in pictures]
    means = np.concatenate([np.array(posterior.mean).reshape(-1, 4) for _, posterior in made])
    for picture, (again, _), quality in zip(pictures, made, found["pictures"].values(), strict=True):
        assert quality["psnr"] == pytest.approx(metrics.psnr(picture, mx.round(again)).item(), abs=0.01)
        assert quality["ssim"] == pytest.approx(metrics.ssim(picture, mx.round(again)).item(), abs=1e-3)
    assert list(found["pictures"]) == ["one/0", "two/0", "1"]
    for measure in ("mse", "psnr", "ssim"):
        assert found[measure] == pytest.approx(np.mean([quality[measure] for quality in found["pictures"].values()]))
    assert found["kl"] == pytest.approx(np.mean([posterior.kl().item() for _, posterior in made]), rel=1e-5)
    latent = found["latent"]
    assert (latent["mean"], latent["std"]) == pytest.approx((means.mean(), means.std()), rel=1e-4, abs=1e-5)
    assert (latent["min"], latent["max"]) == pytest.approx((means.min(), means.max()))
    assert latent["dead"] == (means.var(axis=0) <= 0.01).sum() and latent["channels"] == 4
    assert latent["shape"] == "4 x 4 x 4" and latent["compression"] == SIDE**2 * 3 / 64
    assert found["parameters"] == loading.describe(models["spatial"]).parameters

    grey, laq = answer["models"][1:]
    assert (grey["channels"], grey["image_size"], grey["latent"]["shape"]) == (1, 20, "6")
    assert grey["latent"]["compression"] == 400 / 6 and grey["kl"] > 0
    assert grey["parameters"] == loading.describe(models["grey"]).parameters  # without the statistics of its norms
    assert laq["latent"]["shape"] == "4 codes of 8" and laq["kl"] is None and laq["latent"]["compression"] == 768
    assert all(model["encode_ms"] > 0 and model["decode_ms"] > 0 for model in answer["models"])


def test_the_sheet_shows_pictures_and_differences(
    run: Run, models: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    compared(run, models, photos[:1], tmp_path / "out", "--amplify", 3)
    sheet = load_image(tmp_path / "out/comparison.png")
    picture = load_image(photos[0], resolution=SIDE)
    vae = VAE.from_pretrained(models["spatial"])
    again = np.array(mx.round(vae(mx.array(picture.transpose(2, 0, 1)[None]))[0][0]).astype(mx.uint8)).transpose(
        1, 2, 0
    )
    factor = report.MIN_PANEL // SIDE
    side, gap = SIDE * factor, 4
    bottom = sheet.shape[0] - gap - side
    left = sheet.shape[1] - gap - 4 * side - 3 * gap
    panels = [
        [sheet[top : top + side, x : x + side][::factor, ::factor] for x in range(left, left + 4 * side, side + gap)]
        for top in (bottom - gap - side, bottom)
    ]
    np.testing.assert_array_equal(panels[0][0], picture)
    np.testing.assert_array_equal(panels[0][1], again)
    np.testing.assert_array_equal(panels[1][1], error_map(picture, again, 3))
    assert (panels[1][0] == 255).all()
    assert (panels[0][2][..., 0] == panels[0][2][..., 1]).all()  # of one channel


def test_pairs(run: Run, models: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    network: Any = loading.open_network(models["laq"], config=LAQ / "config.json", pairs=True)
    frames = [mx.array(load_image(photo, resolution=SIDE)[None] / 127.5 - 1) for photo in photos]
    for first, before in (("self", frames), ("previous", [frames[0], *frames])):
        answer = compared(run, models, photos, tmp_path / first, "--first_frame", first, "--json")
        model = answer["models"][2]
        assert ("itself" if first == "self" else "previous image") in model["note"]
        for frame, start, measured in zip(frames, before, model["pictures"].values(), strict=False):
            again = mx.clip(network.decode(start, network.encode(start, frame)), -1, 1)
            error = mx.square((again - frame) * 127.5).mean().item()
            assert measured["mse"] == pytest.approx(error, rel=1e-2)


def test_models_take_turns_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    codecs = [ImageCodec(small_kl()), ImageCodec(small_tiny())]
    for name, codec in zip("ab", codecs, strict=True):
        encode = codec.encode
        monkeypatch.setattr(codec, "encode", lambda given, n=name, e=encode: (turns.append(n), e(given))[1])
    candidates = [comparison.Candidate(name, codec) for name, codec in zip("ab", codecs, strict=True)]
    picture = np.zeros((16, 16, 3), np.uint8)
    assert len(list(comparison.run(candidates, [picture, picture], first="self"))) == 2
    assert turns[:4] == list("abab")  # not timed: caches are filled, and values taken
    rounds = ["".join(pair) for pair in zip(turns[4::2], turns[5::2], strict=True)]
    assert len(rounds) == comparison.ROUNDS and set(rounds) == {"ab", "ba"}
    assert all(len(seconds) == comparison.ROUNDS for each in candidates for seconds in each.seconds)
    assert candidates[1].summary()["kl"] is None  # without variances


def test_lpips_is_measured_where_weights_are_given(
    run: Run, models: dict[str, Path], photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, ...]] = []

    def from_files(*files: str) -> Any:
        opened.append(files)
        return lambda x, y: mx.abs(x - y).mean(axis=(1, 2, 3))

    monkeypatch.setattr("mflux_vae.cli.commands.LPIPS.from_files", from_files)
    answer = compared(run, models, photos[:1], tmp_path / "out", "--lpips", "vgg.pth", "lin.pth")
    assert opened == [("vgg.pth", "lin.pth")] and all(model["lpips"] > 0 for model in answer["models"])
    status, _, err = run("compare", "tiny", "--image", photos[0], "--output", tmp_path, "--lpips", *"abc")
    assert status == 2 and "--lpips" in err


def test_only_our_files_are_overwritten(run: Run, models: dict[str, Path], photos: list[Path]) -> None:
    output = photos[0].parent
    compared(run, models, photos, output)
    compared(run, models, photos, output)
    save_image(output / "comparison.png", np.zeros((8, 8, 3), np.uint8))
    status, _, err = run("compare", models["spatial"], "--image", photos[0], "--output", output)
    assert status == 2 and "exists" in err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--size", "0"], "--size must be positive"),
        (["--amplify", "0"], "--amplify must be positive"),
        (["--config", "a", "--config", "b"], "given 2 times for 1 models"),
        (["--config", "none.json"], "no such file"),
    ],
)
def test_what_does_not_go_is_one_line(
    run: Run, models: dict[str, Path], photos: list[Path], tmp_path: Path, flags: list[str], word: str
) -> None:
    status, _, err = run("compare", models["spatial"], "--image", photos[0], "--output", tmp_path / "out", *flags)
    assert status == 2 and word in err and err.count("\n") == 1


def test_models_have_short_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a/checkpoints/x/best_model.safetensors", "b/checkpoints/x/best_model.safetensors", "c/vae.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sources = [str(path) for path in sorted(tmp_path.rglob("*.*"))]
    assert report.names([*sources, "taesd", "owner/name", "taesd"]) == [
        *("a/checkpoints/x", "b/checkpoints/x", "c", "taesd (1)", "name", "taesd (2)")
    ]


def test_the_size_is_the_models_own_where_all_have_one() -> None:
    flat = ImageCodec(FlatAutoencoder(FlatConfig(image_size=20)))
    laq: Any = open_codec(LAQ / "vae.pt", config=LAQ / "config.json")
    assert isinstance(laq, PairCodec) and laq.side == 32
    assert report.size_of([flat], None) == 20 and report.size_of([flat, laq], None) == 32
    assert report.size_of([flat, ImageCodec(small_kl())], None) == 256
    assert report.size_of([flat], 7) == 7
    with pytest.raises(SettingsError):
        report.size_of([flat], -1)


def test_info_tells_of_vectors(run: Run, models: dict[str, Path]) -> None:
    status, stdout, err = run("info", models["grey"])
    assert status == 0 and "6 numbers for an image of 20 x 20" in stdout and "memory to decode: 20x20" in stdout, err


def test_captions_fit() -> None:
    wide, narrow = caption(["autoencoder of a long name", ""], 400), caption(["autoencoder of a long name"], 60)
    assert wide.shape == (36, 400, 3) and narrow.shape == (18, 60, 3)
    assert (narrow < 128).any() and (narrow[:, [0, -1]] == 255).all() and (wide[18:] == 255).all()


def test_labels_replace_only_letters_that_the_font_lacks():
    assert drawable("Br\u00fccke …~1.png") == drawable("Bru\u0308cke …~1.png") == "Brucke …~1.png"
    assert drawable("猫\n1.png") == "??1.png"
