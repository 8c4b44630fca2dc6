"""ViDiT-Q's decoupling on a video transformer of moving digits, exploratory: docs/results/viditq_video.json.

A tiny Latte learns videos of handwritten digits that drift at a constant speed, with the digit given as text is. Then
three groups of its layers are rounded in turn: attention over the text; attention within a frame and its feed-forward
layers; attention over time and its feed-forward layers. The paper (arXiv 2406.02540, section 4.3) says that each group
controls an aspect of its own. Seen here by videos from the same noise, on noise drawn anew for each seed:

- class: cross-entropy, in nats, of the digit that was asked for, by a classifier of real digits, and its accuracy;
- frames: Fréchet distance of single frames to those of held-out digits, in the features of that classifier;
- motion: root mean square change of the motion (`genlight.metrics.motion`) against full precision, in pixels a frame;
  and change of brightness from a frame to the next that no motion explains ("flicker");
- sqnr: of the predictions along trajectories of full precision, in dB, both guidance branches.

No bar is set: the table says what was seen, and beside each increase its share of the sum of the three groups.

    make proof NAME=viditq_video
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _commands import record

FRAMES, SIZE, DIGIT = 4, 12, 8
CLASSES, TOKENS, CAPTION = 10, 2, 32
STEPS, BATCH = 6000, 32
SAMPLES, NUM_INFERENCE_STEPS, GUIDANCE = 100, 10, 2.0
GROUPS = {
    "cross-attention": r"^transformer_blocks.*\.attn2\.",
    "spatial": r"^transformer_blocks.*\.(attn1|ff)\.",
    "temporal": r"^temporal_transformer_blocks.*\.(attn1|ff)\.",
}
BITS = (4, 3, 2)
ALL, FULL, REAL = "all three", "full precision", "held-out digits"
# what grows where something is lost
LOSSES = ("class", "frames", "motion", "flicker")


def moving(digits: Any, generator: Any) -> Any:
    """Videos [B, 1, FRAMES, SIZE, SIZE] of digits [B, 1, DIGIT, DIGIT]: each drifts by one pixel a frame, along one
    axis or both, and stays within the picture."""
    import torch

    count, room, length = len(digits), SIZE - DIGIT, FRAMES - 1
    # eight directions: a number of two digits to the base 3, without the one that stands still
    number = torch.randint(8, (count,), generator=generator)
    number = number + (number >= 4)
    speed = torch.stack([number // 3, number % 3], dim=1) - 1
    slack = room - length * speed.abs()
    start = (torch.rand(count, 2, generator=generator) * (slack + 1)).long() + length * (speed < 0)
    videos = torch.full((count, 1, FRAMES, SIZE, SIZE), -1.0)
    rows, pixels = torch.arange(count)[:, None, None], torch.arange(DIGIT)
    for frame in range(FRAMES):
        y, x = (start + frame * speed).unbind(dim=1)
        videos[rows, 0, frame, (y[:, None] + pixels)[:, :, None], (x[:, None] + pixels)[:, None, :]] = digits[:, 0]
    return videos


class Data:
    """Digits [N, 1, DIGIT, DIGIT] of one split in [-1, 1], their labels, and random videos of them."""

    def __init__(self, split: str, seed: int) -> None:
        import torch

        from genlight.data.digits import DigitsDataModule

        shape = {"image_size": DIGIT, "channels": 1, "num_classes": CLASSES, "noise_shape": (1, DIGIT, DIGIT)}
        made: Any = DigitsDataModule
        images = made(**shape, batch_size=1, eval_batch_size=1, num_samples=1, seed=seed).load_images(split)
        batch = images.__getitems__(range(len(images)))
        self.digits, self.labels = batch["image"], batch["label"]
        self.generator = torch.Generator().manual_seed(seed)

    def videos(self, count: int) -> tuple[Any, Any]:
        """Videos [count, 1, FRAMES, SIZE, SIZE] and labels [count]."""
        import torch

        chosen = torch.randint(len(self.digits), (count,), generator=self.generator)
        return moving(self.digits[chosen], self.generator), self.labels[chosen]


def scheduler() -> Any:
    """That of training and sampling."""
    from diffusers import DDIMScheduler

    made: Any = DDIMScheduler
    return made(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def captions() -> Any:
    """Embeddings [CLASSES + 1, TOKENS, CAPTION] that stand for a frozen text encoder's; the last is the empty text."""
    import torch

    return torch.randn(CLASSES + 1, TOKENS, CAPTION, generator=torch.Generator().manual_seed(7))


def new_network() -> Any:
    """A Latte of two spatial and two temporal blocks, sixteen tokens a frame."""
    import torch
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    made: Any = LatteTransformer3DModel
    return made(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=SIZE,
        patch_size=3,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=CAPTION,
        video_length=FRAMES,
    )


def train_network(steps: int) -> Any:
    """The averaged weights of a training on videos of digits."""
    import torch

    network, noising, text, data = new_network(), scheduler(), captions(), Data("train", 1)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        videos, labels = data.videos(BATCH)
        labels = torch.where(torch.rand(BATCH) < 0.1, CLASSES, labels)
        noise, t = torch.randn_like(videos), torch.randint(1000, (BATCH,))
        target = noising.get_velocity(videos, noise, t)
        output = network(noising.add_noise(videos, noise, t), t, encoder_hidden_states=text[labels]).sample
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    return average.eval()


def train_classifier(steps: int = 800) -> Any:
    """A classifier of single frames of real digits, wherever they are."""
    import torch
    from torch.nn.functional import cross_entropy

    from genlight.nets.classifier import Classifier

    torch.manual_seed(0)
    network, data = Classifier(SIZE, 1, CLASSES, (16, 32)), Data("train", 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        videos, labels = data.videos(64)
        loss = cross_entropy(network(videos[:, :, step % FRAMES]), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def sample(network: Any, noise: Any, labels: Any) -> Any:
    """Videos of noise [B, 1, FRAMES, SIZE, SIZE] and labels [B], by DDIM, both guidance branches in one call."""
    import torch

    stepper, text = scheduler(), captions()
    stepper.set_timesteps(NUM_INFERENCE_STEPS)
    both = torch.cat([text[labels], text[torch.full_like(labels, CLASSES)]])
    videos = noise
    with torch.no_grad():
        for t in stepper.timesteps:
            output = network(torch.cat([videos, videos]), t.expand(len(both)), encoder_hidden_states=both).sample
            given, empty = output.chunk(2)
            videos = stepper.step(empty + GUIDANCE * (given - empty), t, videos).prev_sample
    return videos.clamp(-1, 1)


class Judge:
    """What is measured of videos."""

    def __init__(self) -> None:
        self.classifier, self.held_out = train_classifier(), Data("val", 3)
        self.reference = self._features(self.held_out.videos(1000)[0])

    def _features(self, videos: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.classifier.forward_features(videos.transpose(1, 2).flatten(0, 1))

    def scores(self, videos: Any, labels: Any, full: Any) -> dict[str, float]:
        """Every number of some videos, `full` being those of full precision."""
        import torch
        from torch.nn.functional import cross_entropy

        from genlight.metrics.motion import motion_error, motion_of
        from genlight.metrics.video import frechet_distance

        with torch.no_grad():
            features = self._features(videos)
            logits = self.classifier.head(features)
        asked = labels.repeat_interleave(FRAMES)
        videos, full = videos.transpose(1, 2), full.transpose(1, 2)
        return {
            "class": float(cross_entropy(logits, asked)),
            "accuracy": float((logits.argmax(dim=1) == asked).float().mean()),
            "frames": frechet_distance(features, self.reference),
            "motion": motion_error(videos, full),
            "flicker": float(motion_of(videos).unexplained.mean()),
        }


def measured(network: Any, judge: Judge, seed: int, samples: int, bits: Iterable[int]) -> dict[str, dict[str, float]]:
    """All numbers by what is rounded, on the noise of one seed."""
    import torch

    from genlight.quantization.convert import replace_layers
    from genlight.quantization.trajectory import decibels, noise_to_signal, recorded_calls

    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(samples, 1, FRAMES, SIZE, SIZE, generator=generator)
    labels = torch.arange(samples) % CLASSES
    with recorded_calls(network) as calls:
        full = sample(network, noise, labels)
    real = judge.held_out.videos(samples)
    rows = {REAL: judge.scores(*real, real[0]), FULL: judge.scores(full, labels, full)}
    for few in bits:
        for name, pattern in {**GROUPS, ALL: "|".join(GROUPS.values())}.items():
            plain, rounded = layers_of(network, pattern, few)
            replace_layers(network, rounded)
            row = judge.scores(sample(network, noise, labels), labels, full)
            row["sqnr"] = decibels(noise_to_signal(network, calls))
            replace_layers(network, plain)
            rows[f"W{few}A8 {name}"] = row
    return rows


def layers_of(network: Any, pattern: str, bits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers of a group as they are and rounded: weights per output channel, inputs of 8 bits per token."""
    from genlight.quantization.convert import quantizable_layers, quantize_layer
    from genlight.quantization.formats import LayerFormat, WeightFormat

    plain = {name: layer for name, layer in quantizable_layers(network).items() if re.search(pattern, name)}
    form = LayerFormat(WeightFormat(bits, symmetric=False))
    return dict(plain), {name: quantize_layer(layer, form) for name, layer in plain.items()}


def table_of(results: Sequence[dict[str, dict[str, float]]], bits: Iterable[int]) -> list[dict[str, Any]]:
    """Means over seeds, then for each number of bits how each group shares in what the three add to each loss.

    A share is None where that sum is less than its standard deviation over the seeds: it would be a share of noise.
    """
    mean = {
        name: {key: fmean(result[name][key] for result in results) for key in row} for name, row in results[0].items()
    }
    rows: list[dict[str, Any]] = [{"rounded": name, **row} for name, row in mean.items()]
    for few in bits:
        added = {
            name: {key: max(0.0, mean[f"W{few}A8 {name}"][key] - mean[FULL][key]) for key in LOSSES} for name in GROUPS
        }
        total = {key: sum(row[key] for row in added.values()) for key in LOSSES}
        sums = {
            key: [sum(result[f"W{few}A8 {name}"][key] - result[FULL][key] for name in GROUPS) for result in results]
            for key in LOSSES
        }
        seen = {key: fmean(each) > (stdev(each) if len(each) > 1 else 0.0) for key, each in sums.items()}
        for name, row in added.items():
            shares = {key: row[key] / total[key] if seen[key] else None for key in LOSSES}
            rows.append({"rounded": f"W{few}A8 {name}: share", **shares})
    return rows


def main() -> None:
    import torch
    from diffusers import LatteTransformer3DModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="videos that judge a network")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training")
    parser.add_argument("--folder", type=Path, help="keep the network here, and use that of an earlier run")
    parser.add_argument("--show", action="store_true", help="print the table and write nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.folder or Path(name)) / "latte"
        if not folder.is_dir():
            train_network(arguments.steps).save_pretrained(folder)
        network: Any = LatteTransformer3DModel.from_pretrained(folder)
    judge = Judge()
    results = [measured(network.eval(), judge, seed, arguments.samples, BITS) for seed in arguments.seeds]
    table = table_of(results, BITS)
    if arguments.show:
        print(json.dumps(table, indent=1))
    else:
        record("viditq_video", [], table, arguments.seeds, started)


if __name__ == "__main__":
    main()
