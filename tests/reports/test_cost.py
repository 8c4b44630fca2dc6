"""MACs against hand counts, time intervals that hold, memory and disk as the system says."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from genlight.reports import cost
from genlight.reports.cost import Phase, PlannedFile, count_macs, estimate

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 16, 2
ATTENTION = 2 * BATCH * TOKENS * TOKENS * WIDTH
PROJECTION = BATCH * TOKENS * WIDTH * WIDTH


class Attention(nn.Module):
    def forward(self, q, k, v, **options):
        return nn.functional.scaled_dot_product_attention(q, k, v, **options)


def tokens():
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(4, 6)}])
def test_attention_alone(options):
    """Q Kᵀ: queries × keys × channels; weights times V: queries × keys × value channels."""
    keys = 4 if "is_causal" in options else 6
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    assert count_macs(Attention(), q, k, v, **options) == 2 * 3 * 4 * keys * (8 + 8)


def test_attention_in_double_precision_and_in_inference_mode():
    with torch.inference_mode():
        q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
        assert count_macs(Attention(), q, q, q) == 2 * 3 * 3 * 8


def test_diffusers_attention_block():
    from diffusers.models.attention_processor import Attention as Block

    block = Block(query_dim=WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    assert count_macs(block, tokens()) == 4 * PROJECTION + ATTENTION


def test_encoder_layer_in_evaluation_under_no_grad():
    """The fused path, which torch's counter sees as nothing."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    expected = 4 * PROJECTION + ATTENTION + 2 * BATCH * TOKENS * WIDTH * 32
    with torch.no_grad():
        assert count_macs(layer, tokens()) == expected
    assert count_macs(nn.TransformerEncoder(layer, 3), tokens()) == 3 * expected


def test_multihead_attention():
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert count_macs(layer, tokens(), tokens(), tokens(), need_weights=False) == 4 * PROJECTION + ATTENTION


def test_convolution_linear_and_grouped():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(288, 5)
    )
    expected = 8 * 8 * 8 * 27 + 6 * 6 * 8 * 2 * 9 + 288 * 5
    assert count_macs(network, torch.zeros(1, 3, 8, 8)) == expected


def test_counting_leaves_the_module_and_the_switches_as_they_were():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    count_macs(network, torch.randn(3, 4))
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(3, 3), torch.zeros(1, 2))
    assert torch.backends.mha.get_fastpath_enabled() is fused
    assert network.training and network[0].training and not network[1].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_total_and_interval_of_equal_steps_are_the_drift_alone(tmp_path):
    result = estimate([Phase("step", (0.1, 0.1, 0.1), 1000)], [], tmp_path, setup_seconds=5.0)
    assert result.total_seconds == pytest.approx(105.0)
    assert result.high_seconds - result.total_seconds == pytest.approx(cost.DRIFT * 100)
    assert result.low_seconds == pytest.approx(105 - cost.DRIFT * 100)


def test_interval_is_that_of_student():
    """t(0.95, 2 degrees) = 2.91999 from the tables."""
    times, count = (0.1, 0.2, 0.3), 50
    half = 2.91999 * 0.1 * math.sqrt(count**2 / 3 + count)
    assert Phase("step", times, count).half_width == pytest.approx(math.hypot(half, cost.DRIFT * 10), rel=1e-5)


def test_interval_covers_the_real_time_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        mean = generator.uniform(0.05, 0.5)
        steps = mean * (1 + 0.2 * generator.standard_normal(203)).clip(0.1)
        phase = Phase("step", tuple(steps[:3]), 200)
        covered += abs(steps[3:].sum() - phase.total) <= phase.half_width
    assert covered / 400 >= cost.CONFIDENCE


def test_low_end_is_never_below_the_setup(tmp_path):
    result = estimate([Phase("step", (0.01, 5.0, 0.01), 100)], [], tmp_path, setup_seconds=3.0)
    assert result.low_seconds == 3.0
    assert estimate([Phase("step", (1.0,), 10)], [], tmp_path).high_seconds == pytest.approx(20 * 1, rel=0.05)


def test_disk_and_memory_are_said(tmp_path):
    files = [PlannedFile("checkpoint", 10**6, 3), PlannedFile("figures", 1000)]
    result = estimate([Phase("step", (0.1,), 1)], files, tmp_path / "not" / "there", extra={"macs_per_sample": 5.0})
    assert result.disk_needed_bytes == math.ceil(cost.DISK_MARGIN * 3_001_000) and result.fits_on_disk
    assert 50e6 < result.peak_memory_bytes < 100e9 and result.peak_gpu_bytes is None
    values = result.to_dict()
    assert values["files"] == {"checkpoint": {"bytes": 10**6, "count": 3}, "figures": {"bytes": 1000, "count": 1}}
    assert values["steps"] == {"step": 1} and values["macs_per_sample"] == 5.0
    assert {"total_seconds", "peak_memory_bytes"} <= set(cost.real_cost(2.0)) & set(values)


def test_the_line_of_an_estimate_is_read_as_it_is_written(tmp_path):
    found = estimate([Phase("training step", (2.0, 3.0), 40)], [], tmp_path, setup_seconds=30.0)
    said = cost.seconds_said(f"before\n| time | {found.line()} |\nafter")
    assert said == pytest.approx((found.total_seconds, found.low_seconds, found.high_seconds), abs=0.5)
    assert cost.seconds_said("nothing of the kind") is None


def test_trainings_come_before_with_their_own_intervals(tmp_path):
    own = estimate([Phase("step", (0.1, 0.1), 100)], [], tmp_path)
    assert cost.after_trainings(own, {}) == own
    found = cost.after_trainings(own, {"a": (60.0, 50.0, 80.0), "b": (5.0, 4.0, 7.0)})
    assert [(phase.name, phase.total) for phase in found.phases[:2]] == [("training of a", 60), ("training of b", 5)]
    assert found.total_seconds == pytest.approx(own.total_seconds + 65)
    assert found.low_seconds == pytest.approx(own.low_seconds + 54)
    assert found.high_seconds == pytest.approx(own.high_seconds + 87)


def test_table_warns_of_a_full_disk(tmp_path):
    from rich.console import Console

    def shown(bytes):
        console = Console(width=100, file=io.StringIO())
        console.print(
            estimate([Phase("training step", (0.1,) * 3, 600)], [PlannedFile("file", bytes)], tmp_path).table()
        )
        return console.file.getvalue()

    assert "600 × 0.1 s = 1 min 0 s" in shown(1000) and "NOT ENOUGH" not in shown(1000)
    assert "NOT ENOUGH" in shown(10**18)


@pytest.mark.parametrize("times", [(), (math.nan,), (-1.0,)])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match='phase "step" needs measured times'):
        Phase("step", times, 1)
