from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genlight.data.digits import DigitsDataModule
from genlight.data.evaluation_noise import EvaluationNoise


def whole(settings, ranks=1, **changes):
    """All validation batches of all ranks, joined in order of the sample index."""
    parts = []
    for rank in range(ranks):
        data = DigitsDataModule(**{**settings, "channels": 1, "num_classes": 10, **changes})
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
        parts += list(data.val_dataloader())
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert joined["index"].tolist() == list(range(len(joined["index"])))
    return joined


@pytest.mark.parametrize(("eval_batch_size", "ranks"), [(1, 1), (7, 1), (100, 1), (1, 2), (3, 2), (100, 2), (4, 3)])
def test_noise_is_the_same_for_any_batch_size_and_number_of_ranks(settings, eval_batch_size, ranks):
    expected = whole(settings, num_samples=29)
    found = whole(settings, ranks, num_samples=29, eval_batch_size=eval_batch_size)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_noise_of_a_sample_is_its_own_numpy_stream():
    noise = EvaluationNoise(5, (2, 3), None, seed=11, draw="select")[3]["noise"]
    rng = np.random.default_rng(np.random.SeedSequence(11, spawn_key=(1, 3)))
    assert noise.dtype == torch.float32
    assert np.array_equal(noise.numpy(), rng.standard_normal((2, 3), dtype=np.float32))


def test_draws_and_seeds_share_no_value():
    values = [
        set(EvaluationNoise(20, (50,), None, seed, draw).__getitems__(range(20))["noise"].flatten().tolist())
        for seed in (0, 1)
        for draw in ("search", "select", "report")
    ]
    assert len(set.union(*values)) > 0.999 * sum(map(len, values))


def test_noise_is_standard_normal():
    noise = EvaluationNoise(500, (4, 8, 8), None, 0, "report").__getitems__(range(500))["noise"].double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5


def test_labels_are_balanced_in_every_prefix():
    labels = EvaluationNoise(2000, (1,), 10, 0, "report").__getitems__(range(2000))["label"]
    assert torch.bincount(labels).tolist() == [200] * 10
    counts = torch.bincount(labels[:64], minlength=10)
    assert counts.max() - counts.min() <= 1


def test_without_classes_there_is_no_label():
    assert EvaluationNoise(2, (1,), None, 0, "report").__getitems__([0, 1]).keys() == {"index", "noise"}


def test_the_latent_shape_and_draw_set_by_the_runner_are_used(settings):
    data = DigitsDataModule(**{**settings, "channels": 1})
    default = next(iter(data.val_dataloader()))
    assert default["noise"].shape == (3, 1, 8, 8)
    data.noise_shape, data.draw = (4, 2, 2), "search"
    other = next(iter(data.val_dataloader()))
    assert other["noise"].shape == (3, 4, 2, 2)
    data.draw = "test"
    with pytest.raises(ValueError, match=r"data.draw='test' is not one of search, select, report"):
        data.val_dataloader()


def test_fewer_samples_than_devices_is_an_error(settings):
    with pytest.raises(Exception, match=r"digits: 1 evaluation samples cannot be shared among 2 devices"):
        whole(settings, ranks=2, num_samples=1)
