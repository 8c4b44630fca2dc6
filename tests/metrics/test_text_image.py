"""Metrics without real images: CLIP score on a tiny random CLIP with a tokenizer of single letters, and others."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, TotalVariation
from torchmetrics.multimodal import CLIPScore

from genlight.errors import UserError
from genlight.metrics.text_image import TextImageMetrics, clip_model

PROMPTS = ["a cat", "two dogs", "house", "a tree", "b"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1, "pad_token_id": len(names) - 1}
    text = {"vocab_size": len(names), "max_position_embeddings": 20, **sizes, **ends}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=2)
    )
    with torch.no_grad():  # the small weights that it begins with make all features alike
        for weight in model.parameters():
            weight.add_(0.5 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def clip_metrics(clip: Path, **others: Any) -> TextImageMetrics:
    return TextImageMetrics(
        {"clip_score": partial(CLIPScore, model_name_or_path=partial(clip_model, str(clip))), **others}
    )


def images(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def cosines(clip: Path, pictures: Tensor, prompts: list[str]) -> Tensor:
    """100 cos of image and text features [B], by transformers alone, each pair by itself."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    model.eval()
    found = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        array = ((picture + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
        inputs = processor(text=[prompt], images=[Image.fromarray(array)], return_tensors="pt")
        with torch.no_grad():
            said = model(**inputs)
        found.append(100 * torch.cosine_similarity(said.image_embeds, said.text_embeds)[0])
    return torch.stack(found)


def test_clip_score_is_the_mean_cosine(clip: Path) -> None:
    pictures, largest = images(5), 0.0
    for shift in range(5):
        texts = PROMPTS[shift:] + PROMPTS[:shift]
        expected = cosines(clip, pictures, texts).mean().item()
        metrics = clip_metrics(clip)
        metrics.set_prompts(texts)
        metrics.update(pictures)
        # the score is cut off below 0
        assert metrics.compute() == {"clip_score": pytest.approx(max(0.0, expected), abs=1e-3)}
        assert metrics.num_samples == 5
        largest = max(largest, expected)
    assert largest > 1.0
    assert metrics.higher_is_better == {"clip_score": True}


def test_batches_do_not_matter_and_reset_forgets(clip: Path) -> None:
    pictures = images(5)
    metrics = clip_metrics(clip, variation=partial(TotalVariation, reduction="mean"))
    whole: list[dict[str, float]] = []
    for size in (5, 2):
        metrics.reset()
        for start in range(0, 5, size):
            metrics.set_prompts(PROMPTS[start : start + size])
            metrics.update(pictures[start : start + size], torch.arange(start, min(start + size, 5)))
        whole.append(metrics.compute())
        assert metrics.num_samples == 5
    assert whole[0] == pytest.approx(whole[1], rel=1e-4, abs=1e-4)
    assert set(whole[0]) == {"clip_score", "variation"}
    metrics.reset()
    with pytest.raises(RuntimeError, match="at least one generated image, got 0"):
        metrics.compute()


def test_a_prompt_for_each_image_is_needed(clip: Path) -> None:
    metrics = clip_metrics(clip)
    with pytest.raises(ValueError, match=r"metrics.clip_score needs a prompt for each of 2 images, got none"):
        metrics.update(images(2))
    metrics.set_prompts(["a"])
    with pytest.raises(ValueError, match="of 2 images, got 1"):
        metrics.update(images(2))
    metrics.set_prompts(["a", "b"])
    metrics.update(images(2))
    with pytest.raises(ValueError, match="got none"):  # those of one batch are not those of the next
        metrics.update(images(2))


class _Kept(Metric):
    """Keeps what it is given, and computes what it was told to."""

    higher_is_better = False

    def __init__(self, answer: Any = 0.0) -> None:
        super().__init__()
        self.answer, self.seen = answer, []
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        self.seen.append(images)
        self.count += len(images)

    def compute(self) -> Any:
        return self.answer


def test_images_come_as_bytes_or_as_floats() -> None:
    metrics = TextImageMetrics({"bytes": _Kept, "floats": _Kept}, float_images=["floats"])
    picture = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    metrics.update(picture)
    whole, unit = metrics.metrics["bytes"].seen[0], metrics.metrics["floats"].seen[0]
    assert whole.dtype == torch.uint8 and whole.shape == (1, 3, 2, 2)
    assert whole[0, 2].flatten().tolist() == [0, 128, 255, 255]
    assert unit[0, 1].flatten().tolist() == [0.0, 0.5, 1.0, 1.0]


def test_values_of_every_form_have_names() -> None:
    answers = {"one": torch.tensor([1.0, 3.0]), "pair": (torch.tensor(5.0), torch.tensor(6.0))}
    answers["named"] = {"quality": torch.tensor([1.0, 2.0])}
    metrics = TextImageMetrics({name: _Kept(answer) for name, answer in answers.items()})
    metrics.update(images(2))
    assert metrics.compute() == {"one": 2.0, "pair": 5.0, "pair_std": 6.0, "named_quality": 1.5}
    assert metrics.higher_is_better["one"] is False
    assert metrics.describe() == {"metrics": {"one": "_Kept", "pair": "_Kept", "named": "_Kept"}}


def test_images_that_are_not_finite_make_every_value_nan() -> None:
    metrics = TextImageMetrics({"one": _Kept, "two": _Kept})
    metrics.update(torch.full((1, 3, 2, 2), float("nan")))
    metrics.update(images(3))
    values = metrics.compute()
    assert all(value != value for value in values.values()) and set(values) == {"one", "two"}
    assert metrics.num_samples == 4
    metrics.reset()
    metrics.update(images(3))
    assert metrics.compute() == {"one": 0.0, "two": 0.0}


def test_nothing_is_built_before_it_is_needed_and_sync_reaches_all() -> None:
    built: list[int] = []

    def make() -> Metric:
        built.append(1)
        return _Kept()

    metrics = TextImageMetrics({"one": make})
    metrics.sync = False
    assert metrics.to("cpu") is metrics and built == []
    metrics.update(images(1))
    metrics.compute()
    assert built == [1] and metrics.metrics["one"]._to_sync is False
    metrics.sync = True
    assert metrics.metrics["one"]._to_sync is True and metrics._counts["images"]._to_sync is True


def test_what_is_refused(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics.metrics is empty"):
        TextImageMetrics({})
    with pytest.raises(ValueError, match=r"metrics.float_images: 'x' is none of one"):
        TextImageMetrics({"one": _Kept}, float_images=["x"])
    with pytest.raises(ValueError, match=r"metrics.psnr: PeakSignalNoiseRatio takes preds, target"):
        TextImageMetrics({"psnr": partial(PeakSignalNoiseRatio, data_range=1.0)}).update(images(2))
    with pytest.raises(UserError, match="is not a folder"):
        clip_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot be loaded as a CLIP model"):
        clip_model(str(tmp_path))
