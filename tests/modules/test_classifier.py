import functools
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from genlight.errors import UserError
from genlight.io import load_tensors
from genlight.modules.classifier import ClassifierModule, random_crop, random_flip
from genlight.nets.classifier import Classifier


def _module(**options):
    return ClassifierModule(
        Classifier(8, 1, 10, (8, 16)), optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), **options
    )


@pytest.mark.parametrize(("size", "channels", "widths"), [(8, 1, (8, 16)), (28, 1, (8, 8, 12)), (32, 3, (8, 16, 32))])
def test_features_are_the_input_of_the_head(size, channels, widths):
    network = Classifier(size, channels, 10, widths, blocks_per_stage=2).eval()
    images = torch.randn(3, channels, size, size)
    features = network.forward_features(images)
    assert features.shape == (3, widths[-1])
    assert torch.equal(network(images), network.head(features))


def test_loss_is_smoothed_cross_entropy():
    module = _module(label_smoothing=0.2)
    module.log = lambda *args, **options: None
    batch = {"image": torch.randn(6, 1, 8, 8), "label": torch.arange(6)}
    loss = module.training_step(batch)
    log_probability = functional.log_softmax(module.network(batch["image"]), dim=1)
    target = functional.one_hot(batch["label"], 10) * 0.8 + 0.02
    assert loss.item() == pytest.approx(-(target * log_probability).sum(1).mean().item(), rel=1e-5)


def test_crops_are_windows_of_the_padded_image_and_all_occur():
    torch.manual_seed(0)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    padded = functional.pad(image, (1, 1, 1, 1), value=-1.0)
    windows = [padded[0, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    found = {
        next(i for i, w in enumerate(windows) if torch.equal(w, crop))
        for crop in random_crop(image.repeat(200, 1, 1, 1), 1)
    }
    assert found == set(range(9))
    assert random_crop(image, 0) is image


def test_flips_mirror_half_of_the_images():
    torch.manual_seed(0)
    images = torch.randn(1000, 1, 4, 4)
    flipped = random_flip(images)
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(images, flipped, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(images, flipped, strict=True)])
    assert bool((mirrored ^ kept).all())
    assert 420 < mirrored.sum() < 580


def test_export_rebuilds_the_network_from_the_file_alone(tmp_path):
    module = _module()
    module.network(torch.randn(4, 1, 8, 8))  # moves the running statistics
    path = module.export(tmp_path)
    tensors, metadata = load_tensors(path)
    rebuilt = Classifier(**json.loads(metadata["architecture"])["config"])
    rebuilt.load_state_dict(tensors)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(rebuilt.eval()(images), module.network.eval()(images))

    from genlight.metrics.features import ClassifierFeatures

    features = ClassifierFeatures(str(path), "digits", dtype="float32")
    # laid out by channels last, sums may be taken in another order
    torch.testing.assert_close(features(images), module.network.forward_features(images), rtol=1e-5, atol=1e-6)


def test_data_and_weights_that_do_not_fit_are_named():
    module = _module()
    module.check_data(SimpleNamespace(image_shape=(1, 8, 8), num_classes=10))
    with pytest.raises(UserError, match=r"data\.image_size = 28, but module\.network\.image_size = 8"):
        module.check_data(SimpleNamespace(image_shape=(1, 28, 28), num_classes=10))
    with pytest.raises(UserError, match=r"data\.num_classes = null, but module\.network\.num_classes = 10"):
        module.check_data(SimpleNamespace(image_shape=(1, 8, 8), num_classes=None))
    with pytest.raises(UserError, match=r"network\.stem\.0\.weight has shape"):
        module.load_state_dict(ClassifierModule(Classifier(8, 1, 10, (12, 16))).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, "len.widths. must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"widths": (8, 8, 8, 8, 8)}, "image_size 8 cannot be divided by stem_stride 1 and then halved 4 times"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**{"image_size": 8, "channels": 1, "num_classes": 10, **arguments})
    with pytest.raises(ValueError, match=r"module\.label_smoothing must be in \[0, 1\), got 1\.0"):
        _module(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"module\.crop_padding must not be negative, got -1"):
        _module(crop_padding=-1)
    with pytest.raises(TypeError, match=r"module\.network is a Linear"):
        ClassifierModule(torch.nn.Linear(2, 2))
