"""The checkpoints of an adapter's training, combined by the real commands: LCM-LoRA of a tiny Stable Diffusion."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import report_of
from modules.test_pipeline import tokenized
from PIL import Image

from genlight.checkpoints.trajectory import Trajectory
from genlight.cli import main

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, class folders of images, the training of an adapter and the search on its checkpoints."""
    root = tmp_path_factory.mktemp("lora")
    tokenized(root).save_pretrained(root / "model")
    draw = np.random.default_rng(0)
    for name in ("circle", "square"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    common = [
        "experiment=lcm/lora_image_folder", "callbacks=collector", f"data.root={root}/images", "data.image_size=64",
        "data.num_classes=2", "data.batch_size=2", "data.eval_batch_size=4", "data.num_samples=8",
        f"module.pretrained={root}/model", "module.lora_rank=2", "module.num_inference_steps=2",
        "callbacks.collector.parameters=lora", "callbacks.collector.every_n_steps=1",
        "callbacks.collector.window=[0,1]",
        f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}",
        "trainer.precision=32-true", "trainer.accelerator=cpu", f"run.root={root}", "run.name=lora",
        f"paths.cache={root}",
    ]  # fmt: skip
    assert main(["fit", *common]) == 0
    search = [
        "method=lcsc", "search=lcsc", "search.budget=6", "search.fidelity=8", "search.finalists=2", "method.select=8",
        "method.singles=2", "method.random_search=false", "method.objective=val/variation", "metrics=clip",
        "~metrics.metrics.clip_score", "+metrics.metrics.variation._target_=torchmetrics.image.TotalVariation",
        "+metrics.metrics.variation._partial_=true", "metrics.float_images=[variation]", f"ckpt_path={root}/lora/fit",
    ]  # fmt: skip
    assert main(["validate", *common, *search]) == 0
    return root


def test_only_the_adapter_is_collected(root: Path) -> None:
    trajectory = Trajectory.open(root / "lora" / "fit" / "trajectory")
    assert len(trajectory.steps) == STEPS
    assert trajectory.shapes and all("lora" in name for name in trajectory.shapes)


def test_its_combination_is_saved_and_reported(root: Path) -> None:
    folder = root / "lora" / "validate"
    rows = {row["kind"]: row for row in report_of(folder)["table"]}
    assert {"LCSC", "last", "single", "swa"} <= rows.keys()
    assert all(row["variation"] > 0 for row in rows.values())
    content = json.loads((folder / "artifact" / "coefficients.json").read_text())
    assert content["name"] in {row["weights"] for row in rows.values()}
    # an average that the training tracked may be better; it has no weights over checkpoints
    assert all(sum(row) == pytest.approx(1.0, abs=1e-9) for row in content["weights"] or ())
