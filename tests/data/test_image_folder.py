import hashlib
import os
import shutil

import pytest
import torch

from genlight.data import image_folder
from genlight.data.image_folder import ImageFolderDataModule, is_held_out, list_images
from genlight.data.images import ImageFiles, ImagesInMemory
from genlight.errors import UserError


@pytest.fixture
def folder(tmp_path, png):
    """Two class folders with 20 images each, of two modes and sizes."""
    root = tmp_path / "pictures"
    for number, name in enumerate(("cat", "ant")):
        for i in range(20):
            file = root / name / f"set{i % 2}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(100 * number + 4 * i, size=8 + i % 3, mode="RGB" if i % 2 else "L"))
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_text("not an image")
    return root


@pytest.fixture
def make(settings):
    return lambda root, **changes: ImageFolderDataModule(**{**settings, "root": root and str(root), **changes})


def joined(data, split):
    batches = list(data.reference_loader(split))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_images_are_found_at_any_depth_without_hidden_ones(folder):
    files = list_images(folder)
    assert len(files) == 40 and files == sorted(files) and files[0] == "ant/set0/0.png"


def test_links_to_folders_are_followed_and_none_for_ever(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ant", "cat"):
        (linked / name).symlink_to(folder / name)
    assert list_images(linked) == list_images(folder)
    (folder / "cat" / "above").symlink_to(linked)
    (folder / "cat" / "itself").symlink_to(folder / "cat")
    assert list_images(linked) == list_images(folder / "cat" / "above")
    (folder / "cat" / "beyond").symlink_to(tmp_path.parent)
    assert list_images(linked)[:20] == list_images(folder)[:20] and len(list_images(linked)) == 40


def test_a_name_that_is_not_utf8_is_a_name(folder, make, png):
    (folder / "cat" / os.fsdecode(b"\xff.png")).write_bytes(png(3))
    assert len(make(folder, held_out_fraction=0.0).images("train")) == 41
    assert is_held_out("ä.png", 0.5) == (hashlib.sha256("ä.png".encode()).digest()[0] < 128)


def test_class_folders_are_numbered_in_alphabetical_order(folder, make):
    data = make(folder, num_classes=2, held_out_fraction=0.0)
    labels = joined(data, "train")["label"]
    assert data.class_names == ("ant", "cat")
    assert labels.tolist() == [0] * 20 + [1] * 20


def test_without_classes_folders_mean_nothing(folder, make, png):
    (folder / "top.JPG").write_bytes(png(0))
    data = make(folder, held_out_fraction=0.0)
    assert joined(data, "train").keys() == {"image"}
    assert len(data.images("train")) == 41


def test_the_split_is_exact_and_depends_on_the_path_only(folder, make, png):
    data = make(folder, held_out_fraction=0.3)
    train, test = (len(data.images(split)) for split in ("train", "test"))
    assert train + test == 40 and 5 <= test <= 20
    held_out = {file for file in list_images(folder) if is_held_out(file, 0.3)}
    (folder / "cat" / "new.png").write_bytes(png(1))
    assert {file for file in list_images(folder) if is_held_out(file, 0.3)} - held_out <= {"cat/new.png"}
    assert sum(is_held_out(str(i), 0.3) for i in range(10_000)) == pytest.approx(3000, abs=200)
    assert not is_held_out("x", 0.0)


def test_reading_as_needed_gives_the_same_images_as_memory(folder, make):
    memory, files = make(folder, num_classes=2), make(folder, num_classes=2, memory_mb=0)
    assert isinstance(memory.images("train"), ImagesInMemory) and isinstance(files.images("train"), ImageFiles)
    for split in ("train", "test"):
        one, other = joined(memory, split), joined(files, split)
        assert all(torch.equal(one[key], other[key]) for key in ("image", "label"))
    assert memory.fingerprint == files.fingerprint
    batches = zip(memory.train_dataloader(), files.train_dataloader(), strict=True)
    assert all(torch.equal(a["image"], b["image"]) for a, b in batches)


def test_a_moved_folder_is_the_same_data_and_a_changed_one_is_not(folder, make, tmp_path, png):
    first = make(folder)
    first.images("train")
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = make(tmp_path / "elsewhere")
    assert moved.fingerprint == first.fingerprint
    cached = list((tmp_path / "cache" / "images").iterdir())
    moved.images("train")
    assert list((tmp_path / "cache" / "images").iterdir()) == cached
    file = tmp_path / "elsewhere" / "ant" / "set0" / "0.png"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert make(tmp_path / "elsewhere").fingerprint != first.fingerprint
    assert make(folder, image_size=16).fingerprint != first.fingerprint
    assert make(folder, held_out_fraction=0.2).fingerprint != first.fingerprint


def test_a_large_set_is_hashed_in_part(folder, make, monkeypatch):
    monkeypatch.setattr(image_folder, "_HASH_ALL_BELOW_BYTES", 0)
    monkeypatch.setattr(image_folder, "_HASH_AT_MOST_FILES", 8)
    before = make(folder).fingerprint
    (folder / "ant" / "set0" / "0.png").write_bytes(b"x" * (folder / "ant" / "set0" / "0.png").stat().st_size)
    assert make(folder).fingerprint != before


def test_horizontal_flip_shows_both_sides(folder, make):
    data = make(folder, horizontal_flip=True, channels=1)
    slopes = [image[0, 4, -1] > image[0, 4, 0] for batch in data.train_dataloader() for image in batch["image"]]
    assert 0 < sum(map(bool, slopes)) < len(slopes)
    plain = make(folder, channels=1)
    assert all(image[0, 4, -1] > image[0, 4, 0] for batch in plain.train_dataloader() for image in batch["image"])
    assert data.fingerprint != plain.fingerprint


LAYOUT = "expected a folder of images, or of class folders of images, named by data.root or GENLIGHT_DATA"


def test_missing_and_empty_folders_say_what_is_expected(make, tmp_path, monkeypatch):
    monkeypatch.delenv("GENLIGHT_DATA", raising=False)
    with pytest.raises(UserError, match=rf"^image_folder: {LAYOUT} \(neither is set\)$"):
        make(None).images("train")
    with pytest.raises(UserError, match=rf"^image_folder: no folder {tmp_path}/none; {LAYOUT}$"):
        make(tmp_path / "none").images("train")
    monkeypatch.setenv("GENLIGHT_DATA", str(tmp_path))
    with pytest.raises(UserError, match=rf"^image_folder: no images in {tmp_path}; {LAYOUT} \(.bmp, "):
        make(None).images("train")


def test_a_corrupt_image_is_named(folder, make):
    file = folder / "ant" / "set1" / "3.png"
    file.write_bytes(file.read_bytes()[:45])
    for memory_mb in (0, 100):
        with pytest.raises(UserError, match=rf"^{file}: not a readable image \(.+\)$"):
            joined(make(folder, held_out_fraction=0.0, memory_mb=memory_mb), "train")


def test_labels_that_are_missing_or_differ_are_reported(folder, make, png):
    with pytest.raises(UserError, match=rf"^data.num_classes=3, but {folder} has 2 class folders$"):
        make(folder, num_classes=3).images("train")
    (folder / "loose.png").write_bytes(png(0))
    with pytest.raises(UserError, match=rf"^labels missing: {folder}/loose.png lies in no class folder; set data.num"):
        make(folder, num_classes=2).images("train")


def test_no_held_out_images_are_reported(folder, make):
    with pytest.raises(UserError, match=r"^image_folder has no held-out images: set data.held_out_fraction above 0"):
        make(folder, held_out_fraction=0.0).reference_loader("test")
    with pytest.raises(UserError, match=r"^data.held_out_fraction=1e-09 leaves no test image in"):
        make(folder, held_out_fraction=1e-9).reference_loader("test")
    make(folder, held_out_fraction=0.0).prepare_data()
    with pytest.raises(ValueError, match=r"data.evaluation=classification needs data.held_out_fraction above 0"):
        make(folder, num_classes=2, evaluation="classification", held_out_fraction=0.0)
    with pytest.raises(ValueError, match=r"data.held_out_fraction=1.0 must be in \[0, 1\)"):
        make(folder, held_out_fraction=1.0)
    with pytest.raises(ValueError, match=r"data.memory_mb=-1 must not be negative"):
        make(folder, memory_mb=-1)
