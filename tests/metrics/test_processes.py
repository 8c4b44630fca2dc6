"""Two gloo processes with unequal shares, one of them with none at first, agree with one process."""

import torch
from metrics.metric_samples import TinyFeatures, images, statistics_of

from genlight.metrics.generative import GenerativeMetrics

COUNT = 45


def build():
    metrics = GenerativeMetrics(TinyFeatures(), ["fd", "kid", "is", "mifd"], kid_subsets=3, kid_subset_size=30)
    metrics.set_reference(statistics_of(images(120, seed=1), metrics.extractor))
    return metrics


def worker(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    fake = images(COUNT, seed=2, shift=0.2)
    metrics, results = build(), []
    # strided shares in batches of 6 (23 and 22 images); everything on rank 0; the two ways must not mix
    for shares in ([torch.arange(r, COUNT, 2) for r in (0, 1)], [torch.arange(COUNT), torch.arange(0)]):
        metrics.reset()
        for part in shares[rank].split(6) if len(shares[rank]) else []:
            metrics.update(fake[part], part)
        results.append([*metrics.compute().values(), metrics.num_samples])
    torch.tensor(results, dtype=torch.float64).numpy().tofile(f"{folder}/result{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    # forked, which saves importing all of this twice
    torch.multiprocessing.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    metrics = build()
    metrics.update(images(COUNT, seed=2, shift=0.2))
    expected = torch.tensor([*metrics.compute().values(), metrics.num_samples], dtype=torch.float64)
    for rank in range(2):
        found = torch.from_file(f"{tmp_path}/result{rank}", size=2 * len(expected), dtype=torch.float64)
        for row in found.reshape(2, -1):
            torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-12)
