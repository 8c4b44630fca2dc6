"""How far two batches of images lie apart, one number per sample; what consistency training makes small.

| name           | value, D = C·H·W numbers in a sample        | source                                          |
|----------------|---------------------------------------------|-------------------------------------------------|
| "l2"           | mean of the squared differences             | Song et al. 2023, section 5                      |
| "l1"           | mean of the absolute differences            | Song et al. 2023, section 5                      |
| "norm"         | Euclidean norm of the difference            | Geng et al. 2024                                 |
| "pseudo_huber" | √(‖x - y‖² + c²) - c, c = 0.00054 √D        | Song & Dhariwal 2023, section 3.3                |
| "huber"        | mean of √(d² + c²) - c, c = 0.001           | Luo et al. 2023, in the code of latent consistency |
| "lpips"        | Zhang et al. 2018, VGG-16 at 224 pixels     | Song et al. 2023, section 5                      |
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genlight.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES = ("l2", "l1", "norm", "pseudo_huber", "huber", "lpips")


def distance(name: str) -> Distance:
    """The function (x, y) -> [B] of tensors [B, ...] that a name stands for; x gets the gradient.

    Raises:
        ValueError: an unknown name.
        UserError: "lpips" where its weights are not at hand.
    """
    if name == "lpips":
        return _lpips()
    known: dict[str, Distance] = {
        "l2": lambda x, y: (x - y).square().flatten(1).mean(1),
        "l1": lambda x, y: (x - y).abs().flatten(1).mean(1),
        "norm": lambda x, y: torch.linalg.vector_norm((x - y).flatten(1), dim=1),
        "pseudo_huber": pseudo_huber,
        "huber": lambda x, y: (((x - y).square() + 1e-6).sqrt() - 1e-3).flatten(1).mean(1),
    }
    if name not in known:
        raise ValueError(f"distance = {name!r}; known are {', '.join(DISTANCES)}")
    return known[name]


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """√(‖x - y‖² + c²) - c per sample [B]; c = 0.00054 √D if None."""
    difference = (x - y).flatten(1)
    c = 0.00054 * math.sqrt(difference.shape[1]) if c is None else c
    squares = difference.square().sum(1)
    return squares / ((squares + c**2).sqrt() + c)  # the same number without the difference of two near ones


def _lpips() -> Distance:
    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        network = _NoTrainLpips(net="vgg")
    except Exception as error:  # torchmetrics, torchvision and a download each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"distance = 'lpips' needs torchvision and its VGG-16 weights ({reason}); use l2, l1 or pseudo_huber"
        ) from error

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        network.to(x.device)
        x, y = (_enlarged(images) for images in (x, y))
        result: Tensor = network(x, y).flatten()
        return result

    return lpips


def _enlarged(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] as VGG takes them: three channels, at least 224 pixels."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    if min(images.shape[2:]) >= 224:
        return images
    return torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=False)
