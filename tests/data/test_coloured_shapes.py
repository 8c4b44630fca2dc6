from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from genlight.data.coloured_shapes import ColouredShapesDataModule, draw_scene, scenes
from genlight.data.sampling import generator
from genlight.errors import UserError
from genlight.metrics.coloured_shapes import COLOURS, RELATIONS, SHAPES, scene_of

SCENES = scenes()


@pytest.fixture
def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "image_size": 16, "channels": 3, "num_classes": 108}


def all_images(data: ColouredShapesDataModule, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(data.reference_loader(split))
    return torch.cat([part["image"] for part in parts]), torch.cat([part["label"] for part in parts])


def test_every_scene_of_two_colours_has_one_prompt_that_reads_back() -> None:
    assert len({scene.prompt for scene in SCENES}) == len(SCENES) == 6 * 9 * 2
    assert all(scene_of(scene.prompt) == scene and scene.first[0] != scene.second[0] for scene in SCENES)


def test_the_first_few_scenes_differ_in_everything() -> None:
    first = SCENES[:16]
    assert {scene.first[0] for scene in first} == {scene.second[0] for scene in first} == set(COLOURS)
    assert {scene.first[1] for scene in first} == {scene.second[1] for scene in first} == set(SHAPES)
    assert {scene.relation for scene in first} == set(RELATIONS)


@pytest.mark.parametrize("scene", SCENES[:12], ids=lambda scene: scene.prompt)
def test_an_image_has_the_scenes_colours_in_the_scenes_order(scene: Any) -> None:
    """Of every pixel, without the rules that score images."""
    rng = generator(0)
    for _ in range(20):
        image = draw_scene(scene, rng)
        found = {tuple(pixel) for pixel in image.reshape(3, -1).T.tolist()}
        assert found == {(0, 0, 0), COLOURS[scene.first[0]], COLOURS[scene.second[0]]}
        places = []
        for colour, _ in (scene.first, scene.second):
            y, x = np.nonzero((image == np.array(COLOURS[colour], np.uint8)[:, None, None]).all(axis=0))
            places.append((x, y) if scene.relation == "left of" else (y, x))
        assert places[0][0].max() < places[1][0].min()
        middles = [[(axis.min() + axis.max()) / 2 for axis in place] for place in places]
        along, across = (b - a for a, b in zip(*middles, strict=True))
        assert along > abs(across)


def test_splits_are_drawn_apart_and_do_not_move_with_the_seed(given: dict[str, Any]) -> None:
    data, other = ColouredShapesDataModule(**given), ColouredShapesDataModule(**{**given, "seed": 99})
    (train, train_labels), (test, test_labels) = (all_images(data, split) for split in ("train", "test"))
    assert train.shape == (4320, 3, 16, 16) and test.shape == (2160, 3, 16, 16)
    assert train.min() == -1 and train.max() == 1
    assert torch.equal(torch.bincount(train_labels), torch.full((108,), 40))
    assert torch.equal(torch.bincount(test_labels), torch.full((108,), 20))
    assert torch.equal(test, all_images(other, "test")[0]) and data.fingerprint == other.fingerprint
    assert not torch.equal(train[:20], test[:20])


def test_images_of_one_prompt_differ(given: dict[str, Any]) -> None:
    images, labels = all_images(ColouredShapesDataModule(**given), "test")
    of_first = [image for image, label in zip(images, labels, strict=True) if label == 0]
    assert sum(not torch.equal(one, other) for one, other in pairwise(of_first)) >= 15


def test_larger_images_repeat_pixels(given: dict[str, Any]) -> None:
    images, _ = all_images(ColouredShapesDataModule(**given), "test")
    large, _ = all_images(ColouredShapesDataModule(**{**given, "image_size": 32}), "test")
    assert torch.equal(large[:, :, 1::2, ::2], images)


def test_grey_and_other_classes_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data.channels = 1 must be 3"):
        ColouredShapesDataModule(**{**given, "channels": 1}).images("test")
    with pytest.raises(ValueError, match=r"data.num_classes=10 must be 108 or null"):
        ColouredShapesDataModule(**{**given, "num_classes": 10})
    with pytest.raises(ValueError, match=r"must be a multiple of 16"):
        ColouredShapesDataModule(**{**given, "image_size": 24})
