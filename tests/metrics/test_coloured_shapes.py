"""The rules against images that are drawn for the purpose, and against what is known of wrong prompts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from genlight.data.coloured_shapes import ColouredShapesDataModule, draw_scene, scenes
from genlight.data.sampling import generator
from genlight.metrics.coloured_shapes import (
    COLOURS,
    SHAPES,
    Scene,
    SceneScore,
    judge,
    judged,
    read_objects,
    scene_of,
    shape_mask,
)
from genlight.metrics.text_image import TextImageMetrics

SCENE = Scene(("rose", "disc"), ("blue", "tile"), "left of")


def drawn(scene: Scene, seed: int = 0) -> np.ndarray:
    return draw_scene(scene, generator(seed))


def verdict(image: np.ndarray, scene: Scene) -> tuple[bool, bool, bool]:
    return judge(read_objects(image[None])[0], scene)


def held_out() -> tuple[Tensor, list[str], Tensor]:
    data = ColouredShapesDataModule(16, 3, 108, 64, 540, 108, 0)
    parts = list(data.reference_loader("test"))
    labels = torch.cat([part["label"] for part in parts])
    return torch.cat([part["image"] for part in parts]), [data.class_names[i] for i in labels], labels


def score(images: Tensor, prompts: list[str]) -> dict[str, float]:
    metrics = TextImageMetrics({"prompt": SceneScore})
    for rows in torch.arange(len(images)).split(500):
        metrics.set_prompts([prompts[i] for i in rows])
        metrics.update(images[rows])
    return metrics.compute()


def test_real_images_score_one_and_shuffled_prompts_what_chance_says() -> None:
    """Two scenes by chance have the same two colours in 1 of 3; then the same shapes in 1 of 9, places in 1 of 4."""
    images, prompts, labels = held_out()
    assert set(score(images, prompts).values()) == {1.0}
    order = generator(1).permutation(len(labels))
    found = score(images, [prompts[i] for i in order])
    assert found["prompt_colours"] == pytest.approx(1 / 3, abs=0.04)
    assert found["prompt_shapes"] == pytest.approx(1 / 27, abs=0.02)
    assert found["prompt_places"] == pytest.approx(1 / 12, abs=0.03)
    assert found["prompt_all"] == pytest.approx(1 / 108, abs=0.01)


def test_each_part_is_judged_by_itself() -> None:
    image = drawn(SCENE)
    assert verdict(image, SCENE) == (True, True, True)
    assert verdict(image, replace(SCENE, second=("lime", "tile"))) == (False, False, False)
    assert verdict(image, replace(SCENE, second=("blue", "plus"))) == (True, False, True)
    assert verdict(image, replace(SCENE, relation="above")) == (True, True, False)
    assert verdict(image, Scene(SCENE.second, SCENE.first, "left of")) == (True, True, False)
    assert verdict(image.swapaxes(1, 2), replace(SCENE, relation="above")) == (True, True, True)
    third = image.copy()
    third[:, :3, :3] = np.array(COLOURS["lime"], np.uint8)[:, None, None]
    assert verdict(third, SCENE) == (False, True, True)


def test_specks_and_smaller_patches_of_a_colour_do_not_count() -> None:
    image = drawn(SCENE)
    blue, lime = (np.array(COLOURS[name], np.uint8) for name in ("blue", "lime"))
    image[:, 15, 0], image[:, 0, 14] = blue, lime
    assert verdict(image, SCENE) == (True, True, True)
    assert set(read_objects(np.zeros((2, 3, 16, 16), np.uint8))[1]) == set()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 7), (7, 5), (12, 14)])
def test_a_shape_is_seen_as_itself_with_some_pixels_wrong(shape: str, size: tuple[int, int]) -> None:
    image = np.zeros((1, 3, 16, 16), np.uint8)
    image[0, 1, 1 : 1 + size[0], 1 : 1 + size[1]] = 255 * shape_mask(shape, *size)
    # dimmed, noisy, and one pixel inside missing
    noise = np.random.default_rng(0).integers(-40, 41, image.shape)
    broken = np.clip(image * 0.8 + noise, 0, 255).astype(np.uint8)
    broken[0, :, 1 + size[0] // 2, 1 + size[1] // 2] = 0
    seen = read_objects(broken)[0]["lime"]
    assert seen.shape == shape
    assert seen.middle == ((size[1] + 1) / 2, (size[0] + 1) / 2)


def test_images_of_a_batch_are_read_one_by_one() -> None:
    """The same objects alone and side by side in a batch, patches of neighbours touching in place."""
    images = np.stack([drawn(scene, seed) for seed, scene in enumerate(scenes()[:30])])
    assert read_objects(images) == [read_objects(image[None])[0] for image in images]


def test_counts_add_up_over_batches_and_by_brute_force() -> None:
    images, prompts, _ = held_out()
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = ((noisy.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8)
    right = judged(levels, prompts)
    assert 0.02 < float(right.all(dim=1).float().mean()) < 0.98
    found = score(noisy, prompts)
    assert found["prompt_all"] == pytest.approx(float(right.all(dim=1).float().mean()))
    assert found["prompt_shapes"] == pytest.approx(float(right[:, 1].float().mean()))


@pytest.mark.parametrize("prompt", ["rose disc", "rose disc left of blue cube", "red disc above blue tile", ""])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="must read like"):
        scene_of(prompt)
    with pytest.raises(ValueError, match="must be one of disc"):
        shape_mask("cube", 3, 3)
