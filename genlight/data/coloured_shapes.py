"""Drawn by code: two coloured shapes side by side or one above the other, and prompts that say which and where."""

from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genlight.data.image_datamodule import ImageDataModule
from genlight.data.images import ImagesInMemory
from genlight.data.sampling import generator
from genlight.errors import UserError
from genlight.metrics.coloured_shapes import COLOURS, RELATIONS, SHAPES, Scene, shape_mask

SIDE = 16
# fixed: neither prompts nor images move with the seed of a run
_ORDER_SEED, _IMAGE_SEEDS = 108, {"train": 1, "test": 2}
_EACH = {"train": 40, "test": 20}
# pixels; two of the largest fit beside each other
_SIDES = (6, 7)
# pixels that an object may lie off the middle, across the relation
_ACROSS = 2


def scenes() -> tuple[Scene, ...]:
    """All 108 of two objects of different colours, in an order by chance: any few of the first differ in everything."""
    every = [
        Scene((one, shape), (other, other_shape), relation)
        for (one, other), shape, other_shape, relation in product(permutations(COLOURS, 2), SHAPES, SHAPES, RELATIONS)
    ]
    return tuple(every[i] for i in generator(_ORDER_SEED).permutation(len(every)))


def draw_scene(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image [3, 16, 16] of 0 to 255: sizes and places, as far as the scene leaves them open, by chance."""
    image = np.zeros((3, SIDE, SIDE), np.uint8)
    for half, (colour, shape) in enumerate((scene.first, scene.second)):
        side = int(rng.choice(_SIDES))
        along = half * SIDE // 2 + int(rng.integers(SIDE // 2 - side + 1))
        across = (SIDE - side) // 2 + int(rng.integers(-_ACROSS, _ACROSS + 1))
        x, y = (along, across) if scene.relation == "left of" else (across, along)
        part = image[:, y : y + side, x : x + side]
        part[:, shape_mask(shape, side, side)] = np.array(COLOURS[colour], np.uint8)[:, None]
    return image


class ColouredShapesDataModule(ImageDataModule):
    """Images of 16x16 pixels in colour, 40 of each of 108 scenes to train on and 20 held out, and a prompt for each.

    An `image_size` of 32, 48, … repeats each pixel. Class names are the prompts, such as "rose disc left of blue tile".
    """

    name = "coloured_shapes"
    class_names = tuple(scene.prompt for scene in scenes())
    size_multiple = SIDE

    def load_images(self, split: str) -> ImagesInMemory:
        if self.channels != 3:
            raise UserError(f"data.channels = {self.channels} must be 3: these shapes are told apart by colour")
        rng, each = generator(_ORDER_SEED, _IMAGE_SEEDS[split]), _EACH[split]
        drawn = [draw_scene(scene, rng) for scene in scenes() for _ in range(each)]
        scale = self.image_size // SIDE
        pixels = torch.from_numpy(np.stack(drawn)).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        labels = None if self.num_classes is None else torch.arange(len(self.class_names)).repeat_interleave(each)
        return ImagesInMemory(pixels, labels)

    def content(self) -> Any:
        return [_ORDER_SEED, _IMAGE_SEEDS, _EACH, _SIDES, _ACROSS, COLOURS, SHAPES, RELATIONS]
