"""Feature extractors: images in [-1, 1] to the vectors that generative metrics compare.

A Fréchet distance says which features it was measured in: only the Inception network of 2015-12-05 makes an "FID".
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.metrics.inception import INPUT_SIZE, NUM_CLASSES, NUM_FEATURES, InceptionV3, resize_like_tensorflow

CONVERT_INCEPTION = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True), 'inception.safetensors')\""
)


class FeatureExtractor(nn.Module):
    """Images [B, C, H, W] in [-1, 1] to features [B, D]; the weights are read at the first use, not in the constructor.

    Attributes:
        name: short name of the features, part of the metric names ("fd_<name>").
        is_inception: True only for the network whose Fréchet distance is called FID.
        recipe: experiment whose ``fit`` makes the weights, or None.
    """

    name: str
    is_inception = False
    recipe: str | None = None

    def setup(self) -> None:
        """Reads the weights once.

        Raises:
            UserError: the weights are missing, damaged or of another network.
        """
        raise NotImplementedError

    def is_available(self) -> bool:
        """Whether ``setup`` would find something to read."""
        return True

    @property
    def num_features(self) -> int:
        raise NotImplementedError

    @property
    def num_logits(self) -> int:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hash of weights and preprocessing: equal fingerprints give equal features."""
        raise NotImplementedError

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and class logits [B, K] in one pass."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Class logits [B, K], for the Inception Score."""
        return self.features_and_logits(images)[1]

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode: batch statistics would make a score depend on the batch size."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """What a report says about the features."""
        return {
            "name": self.name,
            "kind": "inception" if self.is_inception else "classifier",
            "num_features": self.num_features,
            "fingerprint": self.fingerprint,
        }


class ClassifierFeatures(FeatureExtractor):
    """The penultimate layer of a small classifier that genlight trained itself and stored as safetensors.

    Args:
        path: safetensors file with the architecture as JSON in its header (key ``architecture``).
        name: name of the features, e.g. "digits".
        recipe: experiment that makes the file; named in the error when it is missing.
        dtype: the precision of the whole network. "float64" keeps the last digits of a score from depending on the
            batch size; "float32" is for devices without it.
    """

    def __init__(self, path: str, name: str, recipe: str | None = None, dtype: str = "float64") -> None:
        super().__init__()
        if not name.replace("-", "_").isidentifier():
            raise ValueError(f"metrics.extractor.name must be a plain word (it is part of metric names), got {name!r}")
        if name == "inception":
            raise ValueError('metrics.extractor.name "inception" is reserved for the Inception network')
        if dtype not in ("float64", "float32"):
            raise ValueError(f'metrics.extractor.dtype must be "float64" or "float32", got {dtype!r}')
        self.path = Path(path)
        self.name = name
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.network: nn.Module | None = None
        self._fingerprint = ""

    def is_available(self) -> bool:
        return self.path.is_file()

    def setup(self) -> None:
        if self.network is not None:
            return
        from genlight.io import load_tensors, sha256_of

        if not self.is_available():
            how = f"; make it with: python -m genlight fit experiment={self.recipe}" if self.recipe else ""
            raise UserError(f"no feature network at {self.path} (metrics.extractor.path){how}")
        tensors, metadata = load_tensors(self.path)
        network = _classifier(self.path, tensors, metadata).requires_grad_(False).eval()
        # in single precision a third faster on a CPU
        layout = torch.channels_last if self.dtype == torch.float32 else torch.preserve_format
        self.network = network.to(dtype=self.dtype).to(memory_format=layout)  # type: ignore[call-overload]
        self._fingerprint = _digest("classifier", sha256_of(self.path), str(self.dtype))

    @property
    def num_features(self) -> int:
        return int(self._loaded().num_features)

    @property
    def num_logits(self) -> int:
        return int(self._loaded().config["num_classes"])

    @property
    def fingerprint(self) -> str:
        self._loaded()
        return self._fingerprint

    def _loaded(self) -> Any:
        self.setup()
        return self.network

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network = self._loaded()
        size, channels = network.config["image_size"], network.config["channels"]
        if tuple(images.shape[1:]) != (channels, size, size):
            raise ValueError(
                f'features "{self.name}" ({self.path}) are of images [{channels}, {size}, {size}], '
                f"got {list(images.shape[1:])}: choose other metrics, or train features for this data"
            )
        features = network.forward_features(images.to(self.dtype))
        return features, network.head(features)


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of Inception v3 (weights of 2015-12-05): the features of the published FID numbers.

    Images are rounded to the 256 levels that a saved file has, grey ones are repeated to three channels, and all are
    resized to 299×299 by bilinear interpolation in TensorFlow 1.x's way without antialiasing, as Heusel et al. 2017
    (https://arxiv.org/abs/1706.08500) and torch-fidelity do. Logits are those without the bias, as in torch-fidelity.

    Args:
        path: the weights as safetensors; None takes them from torch-fidelity, where that package is installed (it
            downloads them and reads its own download as pickle).
    """

    is_inception = True
    name = "inception"

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.network: InceptionV3 | None = None
        self._fingerprint = ""

    def is_available(self) -> bool:
        from importlib.util import find_spec

        return find_spec("torch_fidelity") is not None if self.path is None else self.path.is_file()

    def setup(self) -> None:
        if self.network is not None:
            return
        if not self.is_available():
            where = "metrics.extractor.path is not set" if self.path is None else f"no file {self.path}"
            raise UserError(
                f"Inception weights not found: {where} (metrics.extractor.path). Download the published weights and "
                f"convert them with: {CONVERT_INCEPTION} - or install genlight[inception]"
            )
        state = _torch_fidelity_weights() if self.path is None else _read_safetensors(self.path)
        with torch.device("meta"):
            network = InceptionV3()
        _load_strictly(network, state, "Inception v3", self.path or "torch-fidelity")
        self._fingerprint = _digest("inception-tf1-299", _state_digest(state))
        self.network = network.float().requires_grad_(False).eval()

    @property
    def num_features(self) -> int:
        return NUM_FEATURES

    @property
    def num_logits(self) -> int:
        return NUM_CLASSES

    @property
    def fingerprint(self) -> str:
        self.setup()
        return self._fingerprint

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.setup()
        assert self.network is not None
        features = self.network(inception_input(images))
        return features, features @ self.network.fc.weight.T  # [B, 1008]


def inception_input(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] to what Inception takes: [B, 3, 299, 299], (level - 128) / 128.

    Raises:
        ValueError: neither one nor three channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"Inception features need images with 1 or 3 channels, got {list(images.shape)}")
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).expand(-1, 3, -1, -1)
    return (resize_like_tensorflow(levels, INPUT_SIZE) - 128) / 128


def _classifier(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> nn.Module:
    """Builds the network that the header describes, without memory for weights, then hangs the tensors into it."""
    from genlight.io import parse_json
    from genlight.nets.classifier import Classifier

    try:
        config = parse_json(metadata["architecture"], f"the header of {path}")
        config = config.get("config", config)
        with torch.device("meta"):
            network = Classifier(**config)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a genlight classifier: its header does not describe one ({type(error).__name__}: {error})"
        ) from error
    _load_strictly(network, tensors, "the classifier its header describes", path)
    return network


def _load_strictly(network: nn.Module, state: dict[str, Tensor], what: str, where: Path | str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # counters that old converters leave out; they play no part in evaluation
    counters = {name for name in wanted if name.endswith("num_batches_tracked") and name not in found}
    wrong = sorted(name for name in (wanted.keys() | found.keys()) - counters if wanted.get(name) != found.get(name))
    if wrong:
        first = [f"{name} {found.get(name, 'missing')}, wanted {wanted.get(name, 'none')}" for name in wrong[:3]]
        raise UserError(
            f"{where} does not hold the weights of {what}: {len(wrong)} entries differ, first: {'; '.join(first)}"
        )
    zeros = {name: torch.zeros((), dtype=torch.long) for name in counters}
    network.load_state_dict({**state, **zeros}, assign=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} (metrics.extractor.path) is not a safetensors file: {error}. No pickle is read; convert the "
            f"published weights with: {CONVERT_INCEPTION}"
        ) from error


def _torch_fidelity_weights() -> dict[str, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        source = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise UserError(
            f"torch-fidelity could not fetch the Inception weights ({error}); download them elsewhere, convert them "
            f"with: {CONVERT_INCEPTION} - and set metrics.extractor.path"
        ) from error
    assert len(source.fc.bias) == NUM_CLASSES
    return {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}


def _state_digest(state: dict[str, Tensor]) -> str:
    """Hash of names and values, so that the two ways to the same weights share cached statistics."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
