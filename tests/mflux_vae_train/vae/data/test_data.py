"""Sources, splits, augmentation and order are functions of (seed, epoch, index)."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import save_image
from mflux_vae_train.vae.data import batches, sources
from mflux_vae_train.vae.data.batches import Augmentation, Batches, Cached, Subset, open_data, prefetch_batches, split
from mflux_vae_train.vae.data.digits import Digits
from mflux_vae_train.vae.data.sources import Arrays, Files, Paths


class Numbers:
    """Images filled with their index."""

    size, channels, starts = 2, 1, None

    def __init__(self, count: int, starts: list[int] | None = None) -> None:
        self.count, self.read = count, []
        self.starts = None if starts is None else np.array(starts)

    def __len__(self) -> int:
        return self.count

    def item(self, index: int) -> np.ndarray:
        self.read.append(index)
        return np.full((2, 2, 1), index % 256, np.uint8)


def painted(path: Path, value: int, size: tuple[int, int] = (6, 8)) -> None:
    save_image(path, np.full((*size, 3), value, np.uint8))


def values(source: batches.Source) -> list[int]:
    return [int(source.item(index).mean()) for index in range(len(source))]


def idx(pictures: np.ndarray) -> bytes:
    return b"\0\0\x08\x03" + struct.pack(">3I", *pictures.shape) + pictures.tobytes()


@pytest.fixture
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Seven and three images of 4 x 4."""
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (7, 4, 4), np.uint8), draw.integers(0, 256, (3, 4, 4), np.uint8)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Frames 10, 11, 12 of video 1, frame 20 of video 2, frames 30 and 31 of video 3."""
    for value in (10, 11, 12, 20, 30, 31):
        painted(tmp_path / "videos" / str(value // 10) / f"{value:05}.jpg", value)
    (tmp_path / "videos" / "3" / "notes.txt").write_text("no frame")
    return tmp_path / "videos"


def test_folders_are_read_recursively_sorted_by_name(tmp_path):
    for value, name in enumerate(["b/x.png", "a.png", "b/c/y.JPG", ".hidden/z.png", "b/.w.png"]):
        painted(tmp_path / name, 10 * value)
    (tmp_path / "b" / "read.me").write_text("")
    train, test = open_data(tmp_path, size=4, channels=3)
    assert test is None and values(train) == [10, 0, 20]
    assert train.item(0).shape == (4, 4, 3) and train.item(0).dtype == np.uint8
    grey, _ = open_data(tmp_path, size=4, channels=1)
    assert grey.item(0).shape == (4, 4, 1) and values(grey) == [10, 0, 20]


def test_what_a_folder_holds_and_is_not_used_is_named(tmp_path, videos, caplog):
    painted(tmp_path / "data" / "a.jpg", 10)
    painted(tmp_path / "data" / "b" / "c.png", 20)
    for name in ("data/b/fake.png", "data/IMG_1.psd", "videos/1/00010.psd"):
        (tmp_path / name).write_bytes(b"8BPS\0\1")
    painted(tmp_path / "data" / "b" / "c-mask.png", 20)
    (tmp_path / "data" / "d.png").symlink_to("/nope/d.png")
    assert values(open_data(tmp_path / "data", size=4, channels=1)[0]) == [10, 20]
    (warning,) = [record.message for record in caplog.records]
    assert all(name in warning for name in ("IMG_1.psd", "fake.png", "c-mask.png", "/nope/d.png"))
    painted(videos / "beside.jpg", 1)
    assert values(open_data(videos, size=4, channels=1, kind="frames")[0]) == [10, 11, 12, 20, 30, 31]
    assert "beside.jpg" in caplog.text and "00010.psd" in caplog.text
    (tmp_path / "data" / "a.jpg").unlink()
    (tmp_path / "data" / "b" / "c.png").unlink()
    with pytest.raises(ImageError, match=r"IMG_1\.psd.*convert"):
        open_data(tmp_path / "data", size=4, channels=1)


def test_extensions_are_trusted_in_large_data_sets(tmp_path, monkeypatch):
    for index in range(3):
        painted(tmp_path / "a" / f"{index}.png", 10)
    painted(tmp_path / "b" / "0.png", 20)
    (tmp_path / "b" / "fake.png").write_bytes(b"8BPS\0\1")
    assert len(sources.folder(tmp_path, size=4, channels=1)) == 4
    monkeypatch.setattr(sources, "MAX_INSPECTED", 2)
    assert len(sources.folder(tmp_path, size=4, channels=1)) == 5


def test_files_are_centre_squares(tmp_path):
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 200
    save_image(tmp_path / "wide.png", picture)
    assert values(sources.folder(tmp_path, size=4, channels=1)) == [200]


def test_bad_files_are_replaced_by_the_next(tmp_path, caplog):
    for value in range(5):
        painted(tmp_path / f"{value}.png", 10 * value)
    for value in (1, 2, 4):
        (tmp_path / f"{value}.png").write_bytes(b"broken")
    source = sources.folder(tmp_path, size=4, channels=1)
    whole = Subset(source, np.arange(5))
    assert values(whole) == values(whole) == [0, 30, 30, 30, 0]
    assert source.bad == {1, 2, 4}
    assert [name for name in ("1.png", "2.png", "4.png") if name in caplog.text] == ["1.png", "2.png", "4.png"]
    for value in (0, 3):
        (tmp_path / f"{value}.png").unlink()
    with pytest.raises(ImageError, match="read"):
        Subset(sources.folder(tmp_path, size=4, channels=1), np.arange(3)).item(0)


def test_a_bad_file_is_not_replaced_by_one_of_the_other_split(tmp_path):
    for value in range(20):
        painted(tmp_path / f"{value:02}.png", 10 * value)
    for seed in range(4):
        train, held_out = split(open_data(tmp_path, size=4, channels=1)[0], 0.3, seed)
        known = set(values(train)), set(values(held_out))
        broken = int(train.indices[seed])
        content = (tmp_path / f"{broken:02}.png").read_bytes()
        (tmp_path / f"{broken:02}.png").write_bytes(b"broken")
        parts = split(open_data(tmp_path, size=4, channels=1)[0], 0.3, seed)
        assert [part.indices.tolist() for part in parts] == [train.indices.tolist(), held_out.indices.tolist()]
        assert set(values(parts[0])) == known[0] - {10 * broken} and set(values(parts[1])) == known[1]
        (tmp_path / f"{broken:02}.png").write_bytes(content)


def test_frames_of_videos_stay_together(videos):
    train, _ = open_data(videos, size=4, channels=1, kind="frames")
    assert values(train) == [10, 11, 12, 20, 30, 31]
    np.testing.assert_array_equal(train.starts, [0, 3, 4])
    for seed in range(5):
        parts = split(train, 0.3, seed)
        owners = [{value // 10 for value in values(part)} for part in parts]
        assert not owners[0] & owners[1] and owners[0] | owners[1] == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("list.txt", "# videos\n3\n\n1/00011.jpg\n1/00012.jpg\n", [30, 31, 11, 12]),
        ("list.json", json.dumps([{"id": "2", "label": "moving"}, {"id": 3}]), [20, 30, 31]),
        ("list.json", json.dumps(["2", "1"]), [20, 10, 11, 12]),
        ("list.txt", "1/00011.jpg\n./3/00030.jpg\n1/00012.jpg\n./3/00031.jpg\n", [11, 12, 30, 31]),
    ],
)
def test_a_list_selects_videos(videos, tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    train, _ = open_data(videos, size=4, channels=1, video_list=tmp_path / name)
    assert values(train) == expected
    assert len(train.starts) == 2


def test_missing_videos_are_counted_and_no_video_is_an_error(videos, tmp_path, caplog):
    video_list = tmp_path / "list.txt"
    video_list.write_text("2\n8\n9/00001.jpg\n")
    assert values(open_data(videos, size=4, channels=1, video_list=video_list)[0]) == [20]
    assert "2 of 3" in caplog.text
    video_list.write_text("8\n")
    with pytest.raises(ImageError, match="frames"):
        open_data(videos, size=4, channels=1, video_list=video_list)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
def test_mnist_as_published(tmp_path, mnist, place, zipped):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, pictures in zip(("train", "t10k"), mnist, strict=True):
        content = gzip.compress(idx(pictures)) if zipped else idx(pictures)
        (folder / f"{name}-images-idx3-ubyte{'.gz' * zipped}").write_bytes(content)
    for source, pictures in zip(open_data(tmp_path, size=4, channels=1), mnist, strict=True):
        assert source is not None and len(source) == len(pictures)
        np.testing.assert_array_equal([source.item(index)[..., 0] for index in range(len(source))], pictures)


def test_mnist_is_resized_and_coloured(tmp_path, mnist):
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(mnist[0]))
    train, test = open_data(tmp_path, size=8, channels=3)
    assert test is None and train.item(3).shape == (8, 8, 3)
    assert abs(train.item(3).mean() - mnist[0][3].mean()) < 8
    assert open_data(tmp_path / "train-images.idx3-ubyte", size=4, channels=1)[0].item(2)[..., 0].tolist() == (
        mnist[0][2].tolist()
    )


def test_npz(tmp_path, mnist):
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=mnist[0], x_test=mnist[1], y_train=np.arange(7))
    train, test = open_data(path, size=4, channels=1)
    np.testing.assert_array_equal(train.item(6)[..., 0], mnist[0][6])
    np.testing.assert_array_equal(test.item(2)[..., 0], mnist[1][2])
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    np.savez(path, pictures=colours, labels=np.arange(2))
    train, test = open_data(path, size=4, channels=3)
    assert test is None
    np.testing.assert_array_equal(train.item(1), colours[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gz", gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2, 4, 4) + bytes(31), mtime=0), "2 images"),
        ("a", b"\0\0\x08\x01" + bytes(20), "IDX"),
        ("a.gz", gzip.compress(bytes(100), mtime=0)[:20], "read"),
        ("a.npz", b"PK\3\4", "read"),
        ("a.npz", b"\x93NUMPY", "read"),
        ("a.npz", {"x_train": np.zeros((2, 3, 3))}, "float64"),
        ("a.npz", {"a": np.zeros((2, 3, 3), np.uint8), "b": np.zeros((2, 3, 3), np.uint8)}, "2 arrays"),
        ("a.npz", {"a": np.zeros((0, 3, 3), np.uint8)}, "images"),
        ("a.npz", {"a": np.zeros((2, 3, 3, 2), np.uint8)}, "uint8"),
    ],
)
def test_broken_files_are_one_line_errors(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        open_data(path, size=4, channels=1)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_data_and_wrong_kinds_are_errors(tmp_path):
    with pytest.raises(ImageError, match="exist"):
        open_data(tmp_path / "nowhere", size=4, channels=1)
    with pytest.raises(ImageError, match="images"):
        open_data(tmp_path, size=4, channels=1)
    with pytest.raises(SettingsError, match="parquet"):
        open_data(tmp_path, size=4, channels=1, kind="parquet")
    with pytest.raises(SettingsError, match="list"):
        open_data("digits", size=4, channels=1, video_list=tmp_path / "list")
    with pytest.raises(ImageError, match="list"):
        open_data(tmp_path, size=4, channels=1, video_list=tmp_path / "list")
    with pytest.raises(ImageError, match="split"):
        split(Numbers(1), 0.1, 0)


def test_digits_are_a_function_of_seed_and_index():
    digits, again = Digits(100, seed=3), Digits(10**9, seed=3)
    for index in (7, 0, 99):
        np.testing.assert_array_equal(digits.item(index), again.item(index))
    assert not np.array_equal(digits.item(0), Digits(100, seed=4).item(0))
    assert {digits.label(index) for index in range(100)} == set(range(10))
    assert Digits(1, seed=0, size=64, channels=3).item(0).shape == (64, 64, 3)


def test_digits_are_legible():
    """The nearest class mean is the right one far more often than by chance."""
    digits = Digits(300, seed=0)
    pictures = np.stack([digits.item(index) for index in range(300)]).reshape(300, -1).astype(float)
    labels = np.array([digits.label(index) for index in range(300)])
    means = np.stack([pictures[:200][labels[:200] == digit].mean(axis=0) for digit in range(10)])
    nearest = ((pictures[200:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[200:]).mean() > 0.4
    assert pictures.max() > 180 and np.median(pictures) < 20
    sides = pictures.reshape(300, 28, 28)[:, [0, -1]]
    assert (sides > 60).mean() < 0.01  # digits do not cross the edge


def test_split_is_a_function_of_the_seed():
    train, held = split(Numbers(50), 0.1, 0)
    assert len(held) == 5 and sorted(values(train) + values(held)) == list(range(50))
    assert values(split(Numbers(50), 0.1, 0)[1]) == values(held) != values(split(Numbers(50), 0.1, 1)[1])
    assert [len(part) for part in split(Numbers(3), 0.01, 0)] == [2, 1]
    assert [len(part) for part in split(Numbers(3), 0.99, 0)] == [1, 2]


def test_augmentation_shifts_and_flips():
    picture = np.arange(30, dtype=np.uint8).reshape(5, 6, 1)
    assert Augmentation()(picture, seed=0, epoch=0, index=0) is picture
    both = Augmentation(flip=True, shift=1)
    padded = np.pad(picture, [(1, 1), (1, 1), (0, 0)], mode="edge")
    possible = {
        np.ascontiguousarray(view[row : row + 5, column : column + 6]).tobytes()
        for view in (padded, padded[:, ::-1])
        for row, column in itertools.product(range(3), range(3))
    }
    augmented = [
        both(picture, seed=0, epoch=epoch, index=index).tobytes() for epoch in range(12) for index in range(12)
    ]
    assert set(augmented) == possible and len(possible) == 18
    assert both(picture, seed=0, epoch=3, index=4).tobytes() == augmented[3 * 12 + 4]


def test_batches_contain_each_image_once_per_epoch():
    source = Numbers(10)
    batches = Batches(source, batch=4, seed=0)
    run = [batches(update) for update in range(10)]
    assert all(batch.shape == (4, 2, 2, 1) and batch.dtype == np.uint8 for batch in run)
    seen = np.concatenate(run)[:, 0, 0, 0].reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen.tolist())
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 4
    for update in (7, 8, 2):
        np.testing.assert_array_equal(batches(update), run[update])
    batches.close()
    assert Batches(source, batch=4, seed=1).positions(0) != Batches(source, batch=4, seed=0).positions(0)


def test_processes_share_a_batch_and_augmentation_changes_with_the_epoch():
    whole = Batches(Numbers(10), batch=6, seed=0)
    rows = [0, 1, 4, 5], [2, 3]
    parts = [Batches(Numbers(10), batch=6, seed=0, rows=part_rows) for part_rows in rows]
    for update in range(4):
        for part_rows, part in zip(rows, parts, strict=True):
            assert part.positions(update) == [whole.positions(update)[row] for row in part_rows]
            np.testing.assert_array_equal(part(update), whole(update)[part_rows])
    for each in (whole, *parts):
        each.close()
    with pytest.raises(SettingsError, match="rows"):
        Batches(Numbers(10), batch=6, seed=0, rows=[])
    draw = Arrays(np.random.default_rng(0).integers(0, 256, (1, 9, 9), np.uint8), size=9, channels=1)
    moved = Batches(draw, batch=1, seed=0, augmentation=Augmentation(shift=3))
    assert len({moved(epoch).tobytes() for epoch in range(8)}) > 4
    moved.close()


def test_two_batches_are_prefetched():
    source = Numbers(10_000)
    batches = Batches(source, batch=32, seed=0)
    for update in range(3):
        batches(update)
    batches.close()
    assert 3 * 32 <= len(source.read) <= (3 + 2) * 32 + 2 * 16


def test_validation_reads_each_image_once():
    pieces = [range(0, 3), range(3, 6), range(6, 7)]
    assert [batch[:, 0, 0, 0].tolist() for batch in prefetch_batches(Numbers(7), pieces)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_sources_of_files_keep_only_names():
    tracemalloc.start()
    try:
        paths = Paths(Path("/data"), (f"{number // 100:06}/{number % 100:05}.jpg" for number in range(20_000)))
        source = Files(paths, size=256, channels=3)
        kept = batches._cached(source)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept is source and len(source) == 20_000
    assert used / 20_000 < 50  # bytes
    assert paths[123] == Path("/data/000001/00023.jpg") and paths[19_999] == Path("/data/000199/00099.jpg")
    with pytest.raises(IndexError):
        paths[20_000]


def test_small_data_sets_are_cached():
    source = Numbers(5)
    kept = Cached(source)
    assert values(kept) == values(kept) == values(Subset(kept, np.arange(5))) == [0, 1, 2, 3, 4]
    assert source.read == [0, 1, 2, 3, 4]
    assert isinstance(open_data("digits", size=28, channels=1, count=10)[0], Cached)
