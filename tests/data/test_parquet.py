from pathlib import Path

import pytest
import torch

from genlight.data.cifar10 import CIFAR10DataModule
from genlight.data.mnist import MNISTDataModule
from genlight.errors import UserError


@pytest.fixture
def folder(tmp_path, png, write_parquet):
    root = tmp_path / "data"
    where = root / "cifar10" / "plain_text"
    write_parquet(where / "train-00000-of-00002.parquet", [png(i) for i in range(30)], [i % 10 for i in range(30)])
    write_parquet(where / "train-00001-of-00002.parquet", [png(50 + i, mode="L") for i in range(12)], [9] * 12)
    write_parquet(where / "test-00000-of-00001.parquet", [png(100 + i) for i in range(8)], list(range(8)))
    return root


@pytest.fixture
def make(settings):
    return lambda root, **changes: CIFAR10DataModule(
        **{**settings, "num_classes": 10, "root": root and str(root), **changes}
    )


def test_files_are_read_in_order_with_their_labels(folder, make):
    data = make(folder)
    batches = list(data.reference_loader("train"))
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    assert images.shape == (42, 3, 8, 8)
    first = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert first == [*range(30), *range(50, 62)]
    assert labels.tolist() == [*[i % 10 for i in range(30)], *[9] * 12]
    assert len(data.images("test")) == 8 and data.class_names[3] == "cat"


@pytest.mark.parametrize("named", ["data", "data/cifar10", "data/cifar10/plain_text"])
def test_the_root_may_be_named_at_three_levels(folder, make, named):
    assert len(make(folder.parent / named).images("test")) == 8


def test_the_environment_names_the_root_and_the_config_wins(folder, make, monkeypatch, tmp_path):
    monkeypatch.setenv("GENLIGHT_DATA", str(folder))
    assert len(make(None).images("test")) == 8
    with pytest.raises(UserError, match=rf"\(nothing like it in {tmp_path}\)$"):
        make(tmp_path).images("test")


def test_the_second_start_reads_the_cache_wherever_the_data_lies(folder, make, tmp_path, monkeypatch):
    before = make(folder)
    first, fingerprint = before.images("train"), before.fingerprint
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(CIFAR10DataModule, "_decode", None)
    after = make(tmp_path / "moved")
    second = after.images("train")
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    assert after.fingerprint == fingerprint


def test_grey_images_on_request_and_no_labels(folder, make):
    data = make(folder, channels=1, num_classes=None)
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"image"} and batch["image"].shape == (4, 1, 8, 8)
    assert data.fingerprint != make(folder).fingerprint


def test_missing_data_says_which_layout_is_expected(make, tmp_path, monkeypatch, folder):
    monkeypatch.delenv("GENLIGHT_DATA", raising=False)
    layout = (
        r"^CIFAR-10 is missing: expected <folder>/cifar10/plain_text/\{train,test\}-\*.parquet with columns img and "
        r"label, <folder> named by data.root or GENLIGHT_DATA"
    )
    with pytest.raises(UserError, match=rf"{layout} \(neither is set\)$"):
        make(None).images("train")
    with pytest.raises(UserError, match=rf"{layout} \(nothing like it in {tmp_path}/none\)$"):
        make(tmp_path / "none").images("train")
    where = folder / "cifar10" / "plain_text"
    (where / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"has 1 of the 2 files train-\*.parquet that train-00000-of-00002.parquet ann"):
        make(folder).images("train")
    (where / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=rf"^CIFAR-10: no test-\*.parquet in {where}$"):
        make(folder).images("test")


def test_a_corrupt_image_is_named_by_file_and_row(folder, make, png, write_parquet):
    images = [png(i) for i in range(8)]
    images[5] = images[5][:50]
    file = write_parquet(folder / "cifar10/plain_text/test-00000-of-00001.parquet", images, range(8))
    with pytest.raises(UserError, match=rf"^{file} row 5: not a readable image \(.+\)$"):
        make(folder).images("test")


@pytest.mark.parametrize(("label", "text"), [(10, "10"), (-1, "-1"), (None, "None")])
def test_a_wrong_label_is_named_by_file_and_row(folder, make, png, write_parquet, label, text):
    file = folder / "cifar10/plain_text/test-00000-of-00001.parquet"
    write_parquet(file, [png(i) for i in range(3)], [0, label, 2])
    with pytest.raises(UserError, match=rf"^{file} row 1: label {text} is not a class from 0 to 9$"):
        make(folder).images("test")


def test_missing_columns_and_rows_are_reported(folder, make, png, write_parquet):
    file = folder / "cifar10/plain_text/test-00000-of-00001.parquet"
    write_parquet(file, [png(0)], None)
    with pytest.raises(UserError, match=rf"^{file}: no column 'label', it has img$"):
        make(folder).images("test")
    assert len(make(folder, num_classes=None).images("test")) == 1
    write_parquet(file, [png(0)], [0], column="picture")
    with pytest.raises(UserError, match=rf"^{file}: no column 'img', it has picture, label$"):
        make(folder).images("test")
    write_parquet(file, [], [])
    with pytest.raises(UserError, match=r"^CIFAR-10: the test split has no rows$"):
        make(folder).images("test")


def test_an_image_may_lie_beside_the_parquet_file_but_not_outside(folder, make, png, write_parquet):
    file = folder / "cifar10/plain_text/test-00000-of-00001.parquet"
    (file.parent / "one.png").write_bytes(png(7))
    write_parquet(file, [{"bytes": None, "path": "one.png"}], [0])
    assert make(folder).images("test").pixels[0, 0, 0, 0] == 7
    write_parquet(file, [{"bytes": None, "path": "gone.png"}], [1])
    with pytest.raises(UserError, match=rf"^{file} row 0: not a readable image \(.*No such file"):
        make(folder).images("test")
    write_parquet(file, [{"bytes": None, "path": "../../../secret.png"}], [0])
    with pytest.raises(
        UserError, match=rf"^{file} row 0: image path '../../../secret.png' leads out of {file.parent}$"
    ):
        make(folder).images("test")
    write_parquet(file, [None], [0])
    with pytest.raises(UserError, match=rf"^{file} row 0: no image bytes, found dict$|found NoneType$"):
        make(folder).images("test")


def test_a_damaged_parquet_file_is_named_whatever_is_damaged(folder, make):
    file = folder / "cifar10/plain_text/test-00000-of-00001.parquet"
    whole = file.read_bytes()
    for length in (0, 3, 11, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=rf"^{file}: (not a readable parquet file|damaged at or after row 0) \(.+\)$"
        ):
            make(folder).images("test")
    unnoticed = 0
    for place in range(0, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            make(folder).images("test")
            unnoticed += 1
        except UserError as error:
            assert str(file) in str(error) or "test split has no rows" in str(error)
    assert unnoticed < len(whole) / 37


def hub(monkeypatch, folder: Path):
    """`datasets` itself, with the hub's answer taken from local files."""
    datasets = pytest.importorskip("datasets")
    load, asked = datasets.load_dataset, []

    def answer(hub_id: str, split: str):
        asked.append((hub_id, split))
        files = {name: str(folder / f"cifar10/plain_text/{name}-*.parquet") for name in ("train", "test")}
        dataset = load("parquet", data_files=files, split=split, cache_dir=str(folder / "hub"))
        return dataset.cast_column("img", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return asked


def test_the_hub_gives_the_same_images_as_its_files(folder, make, monkeypatch):
    monkeypatch.delenv("GENLIGHT_DATA", raising=False)
    asked = hub(monkeypatch, folder)
    local, remote = make(folder), make(None, hub_id="uoft-cs/cifar10")
    for split in ("train", "test"):
        one, other = local.images(split), remote.images(split)
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
    assert asked[0] == ("uoft-cs/cifar10", "train")
    assert remote.fingerprint == make(None, hub_id="uoft-cs/cifar10").fingerprint


def test_a_hub_that_cannot_be_reached_is_one_clear_line(make, monkeypatch):
    monkeypatch.delenv("GENLIGHT_DATA", raising=False)
    datasets = pytest.importorskip("datasets")

    def fail(hub_id: str, split: str):
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = (
        r"^CIFAR-10: cannot load uoft-cs/cifar10 from the Hugging Face hub \(Couldn't reach the hub\); a local copy is "
        r"expected as <folder>/cifar10/plain_text/[^\n]+ named by data.root or GENLIGHT_DATA$"
    )
    with pytest.raises(UserError, match=message):
        make(None, hub_id="uoft-cs/cifar10").images("train")


def test_real_cifar10_held_out_images(real_data, settings):
    data = CIFAR10DataModule(**{**settings, "image_size": 32, "num_classes": 10, "root": real_data})
    images = data.images("test")
    assert images.pixels.shape == (10_000, 3, 32, 32)
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    mean = images.pixels.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4942, 0.4851, 0.4504]).double(), atol=2e-3, rtol=0)


def test_real_mnist(real_data, settings):
    changes = {"image_size": 28, "channels": 1, "num_classes": 10, "root": real_data}
    data = MNISTDataModule(**{**settings, **changes})
    assert [len(data.images(split)) for split in ("train", "test")] == [8000, 2000]
    counts = sum(torch.bincount(data.images(split).labels, minlength=10) for split in ("train", "test"))
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
