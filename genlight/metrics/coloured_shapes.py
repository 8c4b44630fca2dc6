"""Whether an image shows what its prompt says, read off by rules: two flat shapes of some colour, and where they are.

No network takes part, so that content is told apart from how clean an image is: what is found is the nearest colour of
each pixel, the largest connected patch of each colour, and the shape that its bounding box would hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

Mask = NDArray[np.bool_]

# on black; names of four letters, so that the words of a prompt stand nearly in the same place
COLOURS: dict[str, tuple[int, int, int]] = {"rose": (255, 0, 128), "lime": (0, 255, 0), "blue": (0, 0, 255)}
SHAPES = ("disc", "tile", "plus")
# of the first object to the second
RELATIONS = ("left of", "above")
PARTS = ("colours", "shapes", "places")
# pixels of the smallest patch that is an object; smaller ones are specks
_LEAST_AREA = 8
# in units of half a side: a disc of this squared radius lacks corners at six pixels already
_DISC, _ARM = 0.9, 1 / 3
# pixels of one image that touch at a side belong together
_WITHIN_IMAGES = np.stack([np.zeros((3, 3), bool), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3), bool)])


@dataclass(frozen=True)
class Scene:
    """What a prompt says: two objects by colour and shape, and how the first lies to the second."""

    first: tuple[str, str]
    second: tuple[str, str]
    relation: str

    @property
    def prompt(self) -> str:
        """The words, such as "rose disc left of blue tile"."""
        return " ".join((*self.first, self.relation, *self.second))


def scene_of(prompt: str) -> Scene:
    """What a prompt says.

    Raises:
        ValueError: a prompt that is none of `scenes()`.
    """
    for relation in RELATIONS:
        first, found, second = prompt.partition(f" {relation} ")
        if found:
            break
    words = (*first.split(), *second.split())
    if len(words) != 4 or {words[0], words[2]} - set(COLOURS) or {words[1], words[3]} - set(SHAPES):
        raise ValueError(f"prompt = {prompt!r} must read like 'rose disc left of blue tile'")
    return Scene((words[0], words[1]), (words[2], words[3]), relation)


@cache
def shape_mask(shape: str, height: int, width: int) -> Mask:
    """Pixels [height, width] of a shape that fills its bounding box.

    Raises:
        ValueError: another shape.
    """
    y = np.abs((2 * np.arange(height) + 1) / height - 1)[:, None]
    x = np.abs((2 * np.arange(width) + 1) / width - 1)[None, :]
    if shape == "disc":
        return np.asarray(y**2 + x**2 <= _DISC)
    if shape == "plus":
        return np.asarray((y < _ARM) | (x < _ARM))
    if shape == "tile":
        return np.ones((height, width), bool)
    raise ValueError(f"shape = {shape!r} must be one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class SeenObject:
    """A patch of one colour: the shape most like it, and its middle (x, y) in pixels."""

    shape: str
    middle: tuple[float, float]


def read_objects(images: NDArray[np.uint8]) -> list[dict[str, SeenObject]]:
    """The objects in images [B, 3, H, W] of 0 to 255, by colour: the largest patch of each that is no speck."""
    palette = np.array([(0, 0, 0), *COLOURS.values()], np.float32)
    distance = np.stack([np.square(images - colour[:, None, None]).sum(axis=1) for colour in palette])
    nearest = distance.argmin(axis=0)
    found: list[dict[str, SeenObject]] = [{} for _ in images]
    for number, colour in enumerate(COLOURS, start=1):
        patches, _ = ndimage.label(nearest == number, _WITHIN_IMAGES)
        areas, boxes = np.bincount(patches.ravel()), ndimage.find_objects(patches)
        for patch in sorted(range(1, len(areas)), key=areas.__getitem__):
            if areas[patch] >= _LEAST_AREA:
                # a larger one of the same image comes later and takes its place
                image, *sides = boxes[patch - 1]
                y, x = (float(side.start + side.stop - 1) / 2 for side in sides)
                shape = _likest_shape(patches[image.start, *sides] == patch)
                found[image.start][colour] = SeenObject(shape, (x, y))
    return found


def _likest_shape(patch: Mask) -> str:
    """The shape whose pixels in the box of the patch have most in common with it, by intersection over union."""

    def overlap(shape: str) -> float:
        mask = shape_mask(shape, *patch.shape)
        return float((mask & patch).sum() / (mask | patch).sum())

    return max(SHAPES, key=overlap)


def judge(seen: Mapping[str, SeenObject], scene: Scene) -> tuple[bool, bool, bool]:
    """Whether the objects of an image have the colours of a scene and no other, their shapes, their places."""
    wanted = dict((scene.first, scene.second))
    if not set(wanted) <= set(seen):
        return False, False, False
    colours = set(seen) == set(wanted)
    shapes = all(seen[colour].shape == shape for colour, shape in wanted.items())
    (x, y), (other_x, other_y) = (seen[colour].middle for colour in wanted)
    right, down = other_x - x, other_y - y
    along, across = (right, down) if scene.relation == "left of" else (down, right)
    return colours, shapes, along > abs(across)


def judged(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether images uint8 [B, 3, H, W] have colours, shapes and places of their prompts: bool [B, 3].

    Raises:
        ValueError: a text that is no such prompt, or not one for each image.
    """
    seen = read_objects(images.cpu().numpy())
    return torch.tensor([judge(objects, scene_of(prompt)) for objects, prompt in zip(seen, prompts, strict=True)])


class SceneScore(Metric):
    """Shares of images that show what their prompts say, in [0, 1].

    `compute` gives "all" and each of "colours", "shapes" and "places" alone, all of which are counted as wrong where a
    colour of the prompt is missing. Prompts are those of `data=coloured_shapes`.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("counts", torch.zeros(2 + len(PARTS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Adds images uint8 [B, 3, H, W] and the text of each; ValueError as in `judged`."""
        right = judged(images, prompts)
        counts = [torch.tensor(len(right)), right.all(dim=1).sum(), *right.sum(dim=0)]
        self.counts += torch.stack(counts).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """The shares."""
        images, *right = self.counts
        return {name: count / images for name, count in zip(("all", *PARTS), right, strict=True)}
