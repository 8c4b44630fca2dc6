import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from genlight.data import digits
from genlight.data.digits import DigitsDataModule


@pytest.fixture
def data(settings):
    return DigitsDataModule(**{**settings, "channels": 1, "num_classes": 10})


def all_images(data, split):
    parts = list(data.reference_loader(split))
    return torch.cat([part["image"] for part in parts]), torch.cat([part["label"] for part in parts])


def test_both_halves_together_are_scikit_learns_digits(data):
    truth = load_digits()
    expected = {(label, *pixels) for label, pixels in zip(truth.target.tolist(), truth.data.tolist(), strict=True)}
    (train, train_labels), (test, test_labels) = (all_images(data, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (898, 899)
    images, labels = torch.cat([train, test]), torch.cat([train_labels, test_labels])
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    raw = ((images + 1) * 8).reshape(1797, 64).tolist()
    assert {(label, *pixels) for label, pixels in zip(labels.tolist(), raw, strict=True)} == expected
    assert torch.bincount(train_labels).min() > 70


def test_the_split_does_not_move_with_the_seed(data, settings):
    other = DigitsDataModule(**{**settings, "channels": 1, "num_classes": 10, "seed": 99})
    assert torch.equal(all_images(data, "test")[0], all_images(other, "test")[0])
    assert data.fingerprint == other.fingerprint


def test_without_the_file_scikit_learn_is_asked(monkeypatch):
    direct = digits._read_digits()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    assert np.array_equal(direct, digits._read_digits())


def test_larger_images_repeat_pixels_and_channels(settings, data):
    large = DigitsDataModule(**{**settings, "image_size": 24, "channels": 3, "num_classes": 10})
    images = all_images(large, "test")[0]
    assert images.shape == (899, 3, 24, 24) and large.image_shape == (3, 24, 24)
    assert torch.equal(images[:, 1, 2::3, ::3], all_images(data, "test")[0][:, 0])
    assert large.fingerprint != data.fingerprint


def test_labels_are_left_out_without_classes(settings):
    data = DigitsDataModule(**{**settings, "channels": 1})
    assert next(iter(data.train_dataloader())).keys() == {"image"}
    assert next(iter(data.val_dataloader())).keys() == {"index", "noise"}


def test_wrong_sizes_and_classes_are_refused(settings):
    with pytest.raises(ValueError, match=r"data.image_size=12 must be a multiple of 8 for digits"):
        DigitsDataModule(**{**settings, "image_size": 12})
    with pytest.raises(ValueError, match=r"data.num_classes=7 must be 10 or null for digits"):
        DigitsDataModule(**{**settings, "num_classes": 7})


def test_a_batch_of_128_takes_less_than_a_millisecond(settings):
    data = DigitsDataModule(**{**settings, "channels": 1, "num_classes": 10, "batch_size": 128})
    loader = data.train_dataloader()
    list(loader)
    best = float("inf")
    for _ in range(100):
        start = time.thread_time()
        count = sum(1 for _ in loader)
        best = min(best, (time.thread_time() - start) / count)
    assert best < 1e-3
