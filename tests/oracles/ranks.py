"""Several processes of one run, forked from this one: they need not import torch once more, which takes seconds."""

import os
import socket
from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only


def skip_after_cuda() -> None:
    """Skip the test where this process has begun to use CUDA, which no child of it can then use."""
    if torch.cuda.is_initialized():
        pytest.skip("this process has begun to use CUDA, and its children could not")


def in_ranks(action: Callable[[], object], count: int = 2) -> None:
    """Run `action` in so many children, which Lightning takes for those that it starts itself.

    The test is skipped where this process has begun to use CUDA.

    Raises:
        torch.multiprocessing.ProcessException: one of them failed; the others are stopped.
    """
    skip_after_cuda()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    context = torch.multiprocessing.start_processes(
        _ranked, (action, place), nprocs=count, join=False, start_method="fork"
    )
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()


def _ranked(rank: int, action: Callable[[], object], place: dict[str, str]) -> None:
    os.environ.update(place, LOCAL_RANK=str(rank))
    rank_zero_only.rank = rank  # Lightning looked for it when it was imported
    torch.set_num_threads(1)
    action()
