"""Reading, splitting and processing images; the refusals name the file and what to do."""

import io
import json
import struct
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import COLOUR, GREY, MIXED, labels_of, local, save, stacked
from PIL import Image

from quantry.bundled import bundled_images, bundled_model
from quantry.contract import DatasetRef
from worker.calibration.images import (
    ImageSet,
    calibration_images,
    load_images,
    overlap,
    pixels,
)
from worker.errors import DatasetError, ModelError, ModelNotFound
from worker.workspace import Workspace


def folder_of(
    workspace: Workspace, images: Any, labels: str | None = None, file: str = "labels.csv"
) -> DatasetRef:
    folder = workspace.model_roots[0] / "set"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    if labels is not None:
        (folder / file).write_text(labels)
    return local("set", split="all")


@pytest.mark.parametrize("form", ["csv", "headed csv", "json", "txt"])
def test_a_folder_is_read_in_the_order_of_its_labels(form: str, workspace: Workspace) -> None:
    order = [f"{number:03d}.png" for number in (7, 2, 5, 0, 1, 3, 4, 6)]
    classes = [3, 1, 3, 0, 1, 0, 2, 2]
    entries = dict(zip(order, classes, strict=True))
    text = {
        "csv": "".join(f"{file},{label}\n" for file, label in entries.items()),
        "headed csv": "file,label\r\n" + "".join(f'"{file}", {label}\r\n' for file, label in entries.items()),
        "json": json.dumps(entries),
        "txt": "".join(f"{file}  {label}\n" for file, label in entries.items()),
    }[form]
    images = load_images(
        folder_of(workspace, COLOUR[:8], text, f"labels.{form[-4:].strip().removeprefix('d ')}"),
        "evaluation",
        workspace,
    )
    assert labels_of(images) == classes
    assert (stacked(images) == COLOUR[[7, 2, 5, 0, 1, 3, 4, 6]]).all()


def test_a_folder_without_labels_is_read_by_name(workspace: Workspace) -> None:
    images = load_images(folder_of(workspace, GREY[:5]), "calibration", workspace)
    assert images.labels is None
    assert (stacked(images) == GREY[:5]).all()


def test_an_uploads_archive_is_read_as_the_folder_is(workspace: Workspace) -> None:
    folder_of(workspace, GREY[:8], "".join(f"00{i}.png,{i % 3}\n" for i in range(8)))
    folder = workspace.model_roots[0] / "set"
    with zipfile.ZipFile(workspace.uploads["ds_2"], "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    found = load_images(DatasetRef(source="upload", id="ds_2", split="all"), "evaluation", workspace)
    expected = load_images(local("set", split="all"), "evaluation", workspace)
    assert (stacked(found) == stacked(expected)).all()
    assert labels_of(found) == labels_of(expected)


def test_a_file_of_an_upload_is_named_by_the_upload(workspace: Workspace) -> None:
    """Not by where the server keeps it."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(content, "PNG")
    with zipfile.ZipFile(workspace.uploads["ds_2"], "w") as archive:
        archive.writestr("deep.png", content.getvalue())
    images = load_images(DatasetRef(source="upload", id="ds_2", split="all"), "evaluation", workspace)
    with pytest.raises(DatasetError, match=r"^ds_2 \(all\), deep.png: of mode I;16"):
        images[0]


@pytest.mark.parametrize(
    ("labels", "file", "message"),
    [
        (
            "000.png,0\n001.png,cat\n",
            "labels.csv",
            r"labels.csv, line 2, '001.png': 'cat' is no class number",
        ),
        ("000.png,0\n001.png,-1\n", "labels.csv", "'-1' is no class number"),
        ("000.png,0\n001.png,1.0\n", "labels.csv", "'1.0' is no class number"),
        ("000.png,0\n000.png,1\n", "labels.csv", r"line 2: '000.png' has a label already"),
        ("000.png,0\n", "labels.csv", "has no label of '001.png'"),
        ("000.png,0\n001.png,1\n002.png,1\n", "labels.csv", "names '002.png', which is not there"),
        ("../up.npz,0\n000.png,0\n001.png,0", "labels.csv", "names '../up.npz', which is not there"),
        ("000.png,0,1\n", "labels.csv", "line 1: not a file and a label"),
        ("file,label\n", "labels.csv", "labels.csv is empty"),
        ('{"000.png": true, "001.png": 0}', "labels.json", "'True' is no class number"),
        ('{"000.png": 1, "000.png": 0}', "labels.json", "has a label already"),
        ("[1]", "labels.json", "is not a JSON object"),
        ("{", "labels.json", "is not JSON"),
    ],
)
def test_wrong_labels_are_named(labels: str, file: str, message: str, workspace: Workspace) -> None:
    with pytest.raises(DatasetError, match="calibration: labels") as caught:
        load_images(folder_of(workspace, GREY[:2], labels, file), "calibration", workspace)
    assert message in str(caught.value)


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(10_000, 9_500), "more than 89478485 pixels"),
        (png(60_000, 60_000), "more than 89478485 pixels"),
        (png(10, 10)[:40], "is not a readable JPEG or PNG file"),
        (b"", "is not a readable JPEG or PNG file"),
        (b"GIF89a", "is not a readable JPEG or PNG file"),
    ],
)
def test_a_bad_file_is_named_when_it_is_decoded(content: bytes, message: str, workspace: Workspace) -> None:
    ref = folder_of(workspace, GREY[:2])
    (workspace.model_roots[0] / "set" / "001.png").write_bytes(content)
    images = load_images(ref, "calibration", workspace)
    assert (images[0] == GREY[0]).all()
    with pytest.raises(DatasetError, match=rf"set \(\w+\), 001.png.*{message}"):
        images[1]


def test_modes_become_grey_or_rgb(workspace: Workspace) -> None:
    ref = folder_of(workspace, [])
    folder = workspace.model_roots[0] / "set"
    colour = Image.fromarray(COLOUR[0])
    colour.convert("1").save(folder / "1.png")
    colour.quantize(200).save(folder / "2.png")
    colour.convert("CMYK").save(folder / "3.jpg")
    colour.convert("RGBA").save(folder / "4.png")
    images = load_images(ref, "calibration", workspace)
    assert [images[i].shape for i in range(3)] == [(6, 5), (6, 5, 3), (6, 5, 3)]
    assert set(np.unique(images[0])) <= {0, 255}
    with pytest.raises(DatasetError, match=r"set \(\w+\), 4.png: of mode RGBA, or transparent"):
        images[3]


def test_links_out_of_the_folder_are_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    Image.fromarray(GREY[0]).save(tmp_path / "secret.png")
    ref = folder_of(workspace, GREY[:1])
    (workspace.model_roots[0] / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    images = load_images(ref, "calibration", workspace)
    with pytest.raises(DatasetError, match=r"set \(\w+\), link.png is a link out of the folder"):
        images[1]


def test_sources_are_looked_for_as_texts_are(workspace: Workspace) -> None:
    save(workspace, "up.npz", images=GREY, labels=MIXED)
    upload = DatasetRef(source="upload", id="ds_1", split="all")
    assert (stacked(load_images(upload, "calibration", workspace)) == GREY).all()
    for ref, kind, message in (
        (DatasetRef(source="upload", id="ds_9"), DatasetError, "there is no upload ds_9"),
        (DatasetRef(source="bundled", id="bundled/pydoc"), DatasetError, "there is bundled/digits"),
        (DatasetRef(source="hub", id="a/b"), DatasetError, "calibration.dataset.file: name the file inside"),
        (local("../up.npz"), ModelNotFound, "not below any"),
    ):
        with pytest.raises(kind, match=message):
            load_images(ref, "calibration", workspace)
    (workspace.model_roots[0] / "t.txt").write_text("text")
    with pytest.raises(DatasetError, match=r"t.txt is no set of images"):
        load_images(local("t.txt"), "calibration", workspace)


def test_bundled_digits_have_their_own_split(workspace: Workspace) -> None:
    ref = DatasetRef(source="bundled", id="bundled/digits")
    train, test = (load_images(ref, role, workspace) for role in ("calibration", "evaluation"))
    with np.load(bundled_images("bundled/digits")) as arrays:
        assert (stacked(train) == arrays["x_train"]).all()
        assert labels_of(test) == arrays["y_test"].tolist()
    assert test.name == "bundled/digits (test)"
    assert overlap(train, test) == 0


def test_calibration_draws_without_replacement_by_seed(workspace: Workspace) -> None:
    save(workspace, "x.npz", images=GREY, labels=MIXED)
    images = load_images(local("x.npz"), "calibration", workspace)
    drawn = [calibration_images(images, samples=10, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].chosen.tolist() == drawn[1].chosen.tolist() == sorted(set(drawn[0].chosen.tolist()))
    assert drawn[0].chosen.tolist() != drawn[2].chosen.tolist()
    assert labels_of(drawn[0]) == MIXED[drawn[0].chosen].tolist()
    with pytest.raises(DatasetError, match=r"x.npz \(train\) has 36 images; 37 were asked for"):
        calibration_images(images, samples=37, seed=0)


def test_overlap_is_found_over_sources_and_layouts(workspace: Workspace) -> None:
    save(workspace, "x.npz", images=GREY[:20])
    save(workspace, "y.npz", images=GREY[10:30, ..., None])
    parts = [load_images(local(name, split="all"), "calibration", workspace) for name in ("x.npz", "y.npz")]
    files = load_images(folder_of(workspace, GREY[15:25]), "calibration", workspace)
    assert overlap(parts[0], parts[1]) == 0.5
    assert overlap(parts[0], files) == 0.5
    assert overlap(parts[1].take(range(15, 20)), files) == 0


def test_both_sides_of_the_comparison_are_told(workspace: Workspace) -> None:
    save(workspace, "x.npz", images=np.concatenate([GREY, COLOUR[..., 0], COLOUR[..., 1]]))
    images = load_images(local("x.npz", split="all"), "calibration", workspace)
    told: list[tuple[int, int]] = []
    overlap(images.take(range(100)), images.take(range(70)), lambda done, total: told.append((done, total)))
    assert told == [(64, 170), (100, 170), (164, 170), (170, 170)]


def processor(folder: Path, **changes: Any) -> Path:
    known = json.loads((bundled_model("bundled/vit-tiny") / "preprocessor_config.json").read_text())
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps({**known, **changes}))
    return folder


def test_pixels_follow_the_checkpoints_processor(workspace: Workspace, tmp_path: Path) -> None:
    save(workspace, "x.npz", images=np.concatenate([GREY, GREY[::-1]]))
    images = load_images(local("x.npz", split="all"), "evaluation", workspace)
    folder = processor(tmp_path / "m", do_resize=False)
    found = pixels(images, folder, 1)
    expected = torch.from_numpy(stacked(images)).float()[:, None] / 127.5 - 1
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    three = pixels(
        images.take([3]),
        processor(tmp_path / "n", do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        3,
    )
    torch.testing.assert_close(three, expected[3:4].expand(-1, 3, -1, -1), atol=1e-6, rtol=0)


def test_images_of_any_size_are_brought_to_one(workspace: Workspace, tmp_path: Path) -> None:
    ref = folder_of(workspace, [COLOUR[0], COLOUR[1, :4], COLOUR[2, :, :3]])
    images = load_images(ref, "calibration", workspace)
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert pixels(images, processor(tmp_path / "m", **means), 3).shape == (3, 3, 16, 16)
    with pytest.raises(DatasetError, match=r"images of several sizes, and n/preprocessor_config.json"):
        pixels(images, processor(tmp_path / "n", do_resize=False, **means), 3)


def test_one_photo_is_held_at_a_time(tmp_path: Path) -> None:
    held = most = 0

    def freed() -> None:
        nonlocal held
        held -= 1

    def read(index: int) -> np.ndarray:
        nonlocal held, most
        photo = np.full((300, 400, 3), index, np.uint8)
        weakref.finalize(photo, freed)
        held += 1
        most = max(most, held)
        return photo

    photos = ImageSet("photos", read, np.arange(70), None)
    told: list[tuple[int, int]] = []
    folder = processor(tmp_path / "m", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    found = pixels(photos, folder, 3, lambda done, total: told.append((done, total)))
    assert most == 1
    assert told == [(64, 70), (70, 70)]
    torch.testing.assert_close(found[:, 0, 0, 0], torch.arange(70) / 127.5 - 1, atol=1e-6, rtol=0)
    assert overlap(photos.take(range(5)), photos) == 5 / 70
    assert most == 1


def test_pixels_refuse_what_does_not_fit(workspace: Workspace, tmp_path: Path) -> None:
    save(workspace, "x.npz", images=COLOUR)
    images = load_images(local("x.npz", split="all"), "evaluation", workspace)
    with pytest.raises(DatasetError, match=r"x.npz \(all\): image 0 has 3 channels, the model takes 1"):
        pixels(images, processor(tmp_path / "m"), 1)
    with pytest.raises(ModelError, match=r"m/preprocessor_config.json cannot process x.npz"):
        pixels(images, tmp_path / "m", 3)  # its mean is of one channel
    with pytest.raises(ModelError, match=r"has no preprocessor_config.json"):
        pixels(images, tmp_path, 3)
    for content in ("{", "[]", '{"image_processor_type": "Foo", "model_type": 3}'):
        (tmp_path / "m" / "preprocessor_config.json").write_text(content)
        with pytest.raises(
            ModelError, match=r"^m: transformers cannot use preprocessor_config.json"
        ) as caught:
            pixels(images, tmp_path / "m", 3)
        assert str(tmp_path) not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("field", ["size", "crop_size"])
def test_a_processor_that_makes_huge_images_is_refused_before_it_makes_one(
    field: str, workspace: Workspace, tmp_path: Path
) -> None:
    save(workspace, "x.npz", images=COLOUR)
    images = load_images(local("x.npz", split="all"), "evaluation", workspace)
    config = {"image_processor_type": "CLIPImageProcessor", field: {"height": 100_000, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{field} has 100000 pixels; the limit is 4096 a side"):
        pixels(images, tmp_path, 3)


def test_an_image_that_a_processor_makes_huge_is_refused_before_it_makes_it(
    workspace: Workspace, tmp_path: Path
) -> None:
    save(workspace, "x.npz", images=np.zeros((2, 2, 16_000, 3), dtype=np.uint8))
    images = load_images(local("x.npz", split="all"), "evaluation", workspace)
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 224},
        "do_center_crop": False,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"more than 4096 pixels a side of x.npz.* with 2x16000"):
        pixels(images, tmp_path, 3)
