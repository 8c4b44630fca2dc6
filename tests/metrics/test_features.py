"""Feature networks: read safely, described truly, and Inception as its authors published it."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genlight.errors import UserError
from genlight.io import save_tensors
from genlight.metrics.features import ClassifierFeatures, InceptionFeatures, inception_input
from genlight.metrics.inception import InceptionV3, resize_like_tensorflow
from genlight.nets.classifier import Classifier


def stored(path, config=None, metadata=None, seed=0):
    torch.manual_seed(seed)
    network = Classifier(**(config or {"image_size": 8, "channels": 1, "num_classes": 10, "widths": [4, 6]}))
    architecture = {"class": "genlight.nets.classifier.Classifier", "config": network.config}
    save_tensors(path, network.state_dict(), metadata or {"architecture": json.dumps(architecture)})
    return network.eval()


def test_a_stored_classifier_gives_its_own_features_in_double_precision(tmp_path):
    network = stored(tmp_path / "f.safetensors").double()
    extractor = ClassifierFeatures(tmp_path / "f.safetensors", "digits")
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    features, logits = extractor.features_and_logits(images)
    assert features.dtype == torch.float64 and extractor.num_features == 6 and extractor.num_logits == 10
    assert torch.equal(features, network.forward_features(images.double()))
    assert torch.equal(logits, network(images.double())) and torch.equal(extractor(images), features)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_features_do_not_depend_on_training_mode_or_batch(tmp_path):
    stored(tmp_path / "f.safetensors")
    extractor = ClassifierFeatures(tmp_path / "f.safetensors", "digits").train()
    images = torch.rand(9, 1, 8, 8)
    alone = torch.cat([extractor(image[None]) for image in images])
    assert torch.allclose(extractor(images), alone, rtol=1e-12, atol=1e-14)


def test_the_constructor_touches_neither_disk_nor_random_state(tmp_path):
    state = torch.get_rng_state()
    extractor = ClassifierFeatures(tmp_path / "missing.safetensors", "digits", recipe="features/digits")
    assert not extractor.is_available() and not InceptionFeatures(tmp_path / "x").is_available()
    with pytest.raises(UserError, match=r"no feature network at .*missing.*fit experiment=features/digits"):
        extractor.setup()
    stored(tmp_path / "f.safetensors")
    torch.set_rng_state(state)
    ClassifierFeatures(tmp_path / "f.safetensors", "digits").setup()
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_follows_weights_and_precision(tmp_path):
    stored(tmp_path / "a.safetensors", seed=0)
    stored(tmp_path / "b.safetensors", seed=1)
    prints = [
        ClassifierFeatures(tmp_path / name, "digits", dtype=dtype).fingerprint
        for name, dtype in [("a.safetensors", "float64"), ("a.safetensors", "float32"), ("b.safetensors", "float64")]
    ]
    assert len(set(prints)) == 3
    assert ClassifierFeatures(tmp_path / "a.safetensors", "other").fingerprint == prints[0]


@pytest.mark.parametrize(
    "architecture, message",
    [
        (None, "KeyError"),
        ('{"config": {"image_size": 8}}', "TypeError"),
        ('{"config": {"image_size": 8, "channels": 1, "num_classes": 3, "widths": [4, 6]}}', "entries differ"),
        ('{"config": {"image_size": 8, "channels": 1, "num_classes": 10, "widths": [1000000, 1000000]}}', "differ"),
        ('{"config": "__import__"}', "TypeError"),
        ("[1, 2", "not"),
    ],
)
def test_foreign_headers_are_refused_in_one_line(tmp_path, architecture, message):
    metadata = {"other": "x"} if architecture is None else {"architecture": architecture}
    stored(tmp_path / "f.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        ClassifierFeatures(tmp_path / "f.safetensors", "digits").setup()
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "f.safetensors"
    stored(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError):
        ClassifierFeatures(path, "digits").setup()


def test_images_of_another_size_are_named(tmp_path):
    stored(tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r'features "digits".*are of images \[1, 8, 8\], got \[3, 32, 32\]'):
        ClassifierFeatures(tmp_path / "f.safetensors", "digits")(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["inception", "a b", ""])
def test_names_that_could_mislead_are_refused(name):
    with pytest.raises(ValueError, match=r"metrics\.extractor\.name"):
        ClassifierFeatures("x", name)


def test_inception_without_weights_says_how_to_get_them(tmp_path):
    for path in (None, tmp_path / "no"):
        with pytest.raises(UserError, match=r"safetensors\.torch.*genlight\[inception\]"):
            InceptionFeatures(path).setup()
    pickled = tmp_path / "pt_inception.pth"
    pickled.write_bytes(b"\x80\x02cos\nsystem\nq\x00.")
    with pytest.raises(UserError, match="No pickle is read"):
        InceptionFeatures(pickled).setup()
    save_file({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="entries differ"):
        InceptionFeatures(tmp_path / "half.safetensors").setup()


def test_inception_has_the_published_size_and_reads_weights_from_a_file(tmp_path):
    """21,785,568 parameters before the classifier, as in torchvision, and 1008 outputs."""
    torch.manual_seed(0)
    network = InceptionV3().eval()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 21_785_568 + 2048 * 1008 + 1008
    # converters leave the counters of batch normalisation out
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "inception.safetensors")
    extractor = InceptionFeatures(str(tmp_path / "inception.safetensors"))
    grey = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        features, logits = extractor.features_and_logits(grey)
        expected = network(inception_input(grey))
    assert features.shape == (2, extractor.num_features) and logits.shape == (2, extractor.num_logits)
    assert torch.allclose(features, expected, atol=1e-6)
    assert extractor.describe()["kind"] == "inception" and len(extractor.fingerprint) == 16


def test_inception_weights_have_the_published_names():
    """Hash of the sorted names of pt_inception-2015-12-05 (those of torchvision without the auxiliary classifier)."""
    with torch.device("meta"):
        names = sorted(name for name in InceptionV3().state_dict() if "num_batches" not in name)
    assert len(names) == 94 * 5 + 2
    assert {name.split(".")[0] for name in names} >= {"Conv2d_1a_3x3", "Mixed_5b", "Mixed_6e", "Mixed_7c", "fc"}
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest.startswith(PUBLISHED_NAMES)


def test_inception_input_is_that_of_a_saved_file():
    images = torch.tensor([-1.0, 1.0, 0.0, 5.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    levels = inception_input(images)[:, 0, 0, 0] * 128 + 128
    assert levels.tolist() == [0, 255, 128, 255]
    assert inception_input(images).shape == (4, 3, 299, 299)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        inception_input(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("height, width, size", [(3, 5, 7), (10, 4, 6), (6, 6, 6)])
def test_resize_follows_tensorflow_one(height, width, size):
    """out[i, j] samples in[i·H/size, j·W/size] bilinearly, clamped at the far edge."""
    image = np.random.default_rng(0).random((height, width))
    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - y + top) + lower * (y - top)
    found = resize_like_tensorflow(torch.from_numpy(image)[None, None], size)[0, 0].numpy()
    assert np.abs(found - expected).max() < 1e-12


PUBLISHED_NAMES = "ed87dd0f166ade68"
