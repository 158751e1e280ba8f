"""Arrays of images and JPEG files joined in an .npz: splits, labels, and archives that are refused."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import COLOUR, GREY, GROUPED, MIXED, labels_of, local, save, stacked
from PIL import Image

from quantry.contract import DatasetRef
from worker.calibration.images import (
    check_labels,
    load_images,
)
from worker.errors import DatasetError
from worker.workspace import Workspace


@pytest.mark.parametrize("array", [GREY, COLOUR])
def test_arrays_are_split_in_nine_tenths_and_one(array: np.ndarray, workspace: Workspace) -> None:
    save(workspace, "x.npz", images=array, labels=MIXED.astype(np.uint8))
    train = load_images(local("x.npz"), "calibration", workspace)
    test = load_images(local("x.npz"), "evaluation", workspace)
    assert (stacked(train) == array[:36]).all()
    assert (stacked(test) == array[36:]).all()
    assert labels_of(train) + labels_of(test) == MIXED.tolist()
    assert test.labels is not None
    assert test.labels.dtype == np.int64
    assert (train.name, test.name) == ("x.npz (train)", "x.npz (test)")
    assert len(load_images(local("x.npz", split="all"), "evaluation", workspace)) == 40


@pytest.mark.parametrize("labels", [GROUPED, GROUPED[::-1], np.array([2, 0, 3, 1])[GROUPED]])
def test_runs_of_one_class_are_shuffled_always_alike(labels: np.ndarray, workspace: Workspace) -> None:
    save(workspace, "x.npz", images=GREY, labels=labels)
    parts = [load_images(local("x.npz"), role, workspace) for role in ("calibration", "evaluation")]
    again = load_images(local("x.npz"), "calibration", workspace)
    assert labels_of(parts[0]) == labels_of(again)
    assert len(set(labels_of(parts[0])[:12])) == 4
    pairs = {
        (image.tobytes(), label) for part in parts for image, label in zip(part, labels_of(part), strict=True)
    }
    assert pairs == {(image.tobytes(), label) for image, label in zip(GREY, labels.tolist(), strict=True)}


@pytest.mark.parametrize("train", ["calib", "train"])
def test_a_file_may_have_a_split_of_its_own(train: str, workspace: Workspace) -> None:
    own = {f"x_{train}": GREY[:30], f"y_{train}": MIXED[:30], "x_test": GREY[30:], "y_test": MIXED[30:]}
    save(workspace, "x.npz", **own)
    assert (stacked(load_images(local("x.npz"), "calibration", workspace)) == GREY[:30]).all()
    assert (stacked(load_images(local("x.npz"), "evaluation", workspace)) == GREY[30:]).all()
    assert (stacked(load_images(local("x.npz", split="all"), "evaluation", workspace)) == GREY).all()
    assert labels_of(load_images(local("x.npz", split="train"), "evaluation", workspace)) == list(MIXED[:30])


def test_what_stands_only_in_another_split_is_not_taken(workspace: Workspace) -> None:
    save(workspace, "x.npz", x_test=GREY, y_test=MIXED)
    with pytest.raises(DatasetError, match=r"x.npz has no split 'train'; it has test"):
        load_images(local("x.npz"), "calibration", workspace)


def test_labels_are_not_needed_to_calibrate(workspace: Workspace) -> None:
    save(workspace, "x.npz", images=GREY)
    images = load_images(local("x.npz"), "evaluation", workspace)
    assert images.labels is None
    with pytest.raises(DatasetError, match=r"evaluation: x.npz \(test\) has no labels"):
        check_labels(images, 10, "evaluation")


def test_labels_must_be_classes_of_the_head(workspace: Workspace) -> None:
    save(workspace, "x.npz", images=GREY, labels=MIXED)
    images = load_images(local("x.npz"), "calibration", workspace)
    check_labels(images, 4, "evaluation")
    with pytest.raises(DatasetError, match="has the label 3, and the model's head knows classes 0 to 2"):
        check_labels(images, 3, "evaluation")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pictures": GREY},
            "has no array `images`, `x_calib`, `x_train`, `x_test` or `jpeg`; it has pictures",
        ),
        ({"images": GREY, "x_test": GREY}, "has `images` beside a split of its own"),
        ({"images": GREY.astype(np.float32)}, r"images: of type '<f4'; images are uint8"),
        ({"images": GREY.astype(np.int16)}, r"images: of type <i2; images are uint8"),
        ({"images": GREY[0]}, r"of shape \(6, 5\), not \(N, H, W\)"),
        ({"images": np.moveaxis(COLOUR, 3, 1).copy()}, "put the channels last"),
        ({"images": GREY.reshape(40, 3, 2, 5)}, "put the channels last"),
        ({"images": np.zeros((4, 4, 4, 4), np.uint8)}, r"not \(N, H, W\) or \(N, H, W, 1 or 3\)$"),
        ({"images": GREY[:0]}, "holds no image"),
        ({"images": np.asfortranarray(GREY)}, "not an array in C order"),
        ({"images": GREY, "labels": MIXED[:39]}, r"labels: of shape \(39,\); 40 images need \(40,\)"),
        ({"images": GREY, "labels": MIXED.astype(float)}, "labels integers"),
        ({"images": GREY, "labels": np.array(["a"] * 40)}, "labels integers"),
        ({"images": GREY, "labels": np.array([None] * 40)}, "labels integers"),
        ({"images": GREY[:1]}, "holds no image; choose another split"),
    ],
)
def test_unfit_arrays_are_named(arrays: dict[str, Any], message: str, workspace: Workspace) -> None:
    save(workspace, "bad.npz", **arrays)
    with pytest.raises(DatasetError, match=r"calibration: bad.npz.*") as caught:
        load_images(local("bad.npz"), "calibration", workspace)
    assert caught.match(message)


def member(shape: str, size: int, descr: str = "|u1") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("(1000000, 300, 300)", 8), "its header describes 90000000000 bytes, the archive declares 8"),
        (member("(3, -2, 2)", 8), "not an array in C order"),
        (member("(3, 2.0, 2)", 12), "not an array in C order"),
        (member("(3, 20000, 1)", 60000), "16384 pixels a side"),
        (member("(3, 2, 2", 12), "the npy header cannot be read"),
        (member("(" * 5000, 12), "the npy header cannot be read"),
        (member("(3, 2, 2)", 12, "|O"), "of type '|O'"),
        (b"\x80\x04pickle", "is not a numpy array"),
        (b"", "is not a numpy array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "a header of 4294967295 bytes"),
    ],
)
def test_hostile_members_are_refused_before_they_are_read(
    content: bytes, message: str, workspace: Workspace
) -> None:
    with zipfile.ZipFile(workspace.model_roots[0] / "bad.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(DatasetError, match=r"bad\.npz") as caught:
        load_images(local("bad.npz"), "calibration", workspace)
    assert message in str(caught.value)


def test_an_archive_that_inflates_too_far_is_refused(workspace: Workspace) -> None:
    shape, size = "(300000, 128, 128)", 300_000 * 128 * 128
    path = workspace.model_roots[0] / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member(shape, 0))
    data = path.read_bytes()
    declared = struct.pack("<I", (len(member(shape, 0)) + size) % 2**32)
    start = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: start + 24] + declared + data[start + 28 :])
    with pytest.raises(DatasetError, match=r"declares|4294967296 bytes in all"):
        load_images(local("bomb.npz"), "calibration", workspace)


def test_what_is_no_archive_is_refused(workspace: Workspace) -> None:
    root = workspace.model_roots[0]
    save(workspace, "whole.npz", images=GREY)
    whole = (root / "whole.npz").read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:-30], whole[: len(whole) // 2], b"x" * 100):
        (root / "bad.npz").write_bytes(content)
        with pytest.raises(DatasetError, match=r"calibration: bad.npz is not a"):
            load_images(local("bad.npz"), "calibration", workspace)
    damaged = bytearray(whole)
    damaged[300] ^= 1
    (root / "bad.npz").write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"bad.npz .*: Bad CRC"):
        load_images(local("bad.npz"), "calibration", workspace)


@pytest.mark.parametrize("arrays", [("images",), ("x_train", "x_test")])
def test_an_array_is_not_copied_when_it_was_read(arrays: tuple[str, ...], workspace: Workspace) -> None:
    part = np.zeros((8_000_000 // len(arrays) // 400, 20, 20), np.uint8)
    save(workspace, "x.npz", **dict.fromkeys(arrays, part))
    tracemalloc.start()
    images = load_images(local("x.npz", split="all"), "evaluation", workspace)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) * 400 == 8_000_000
    assert peak < 1.2 * 8_000_000


def joined(path: Path, count: int = 20, **changes: Any) -> Path:
    """PNG files in one array of bytes, image i all of grey level i."""
    files = []
    for level in range(count):
        content = io.BytesIO()
        Image.fromarray(np.full((4, 4), level, dtype=np.uint8)).save(content, "PNG")
        files.append(np.frombuffer(content.getvalue(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.concatenate(files), "offset": offsets, "y": np.arange(count) % 3, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_joined_files_are_images_with_labels(workspace: Workspace) -> None:
    joined(workspace.model_roots[0] / "joined.npz")
    ref = DatasetRef(source="local", id="joined.npz", split="all")
    images = load_images(ref, "calibration", workspace)
    assert len(images) == 20
    assert [int(images[i][0, 0]) for i in (0, 7, 19)] == [0, 7, 19]
    assert images.labels is not None
    assert images.labels.tolist() == [i % 3 for i in range(20)]
    assert len(load_images(ref.model_copy(update={"split": "test"}), "evaluation", workspace)) == 2


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"offset": None}, "`jpeg` without `offset`"),
        ({"offset": np.arange(21) * 10**6}, "does not rise"),
        ({"y": np.zeros(3, dtype=np.int64)}, "20 images need"),
        ({"jpeg": np.zeros((2, 2), dtype=np.uint8)}, "bytes are uint8"),
    ],
)
def test_joined_files_that_do_not_fit_are_refused(
    changes: dict[str, Any], fault: str, workspace: Workspace
) -> None:
    joined(workspace.model_roots[0] / "joined.npz", **changes)
    with pytest.raises(DatasetError, match=fault):
        load_images(DatasetRef(source="local", id="joined.npz"), "calibration", workspace)
