"""A data module on a table in memory."""

from typing import Any

import torch

from genlight.data.architectures import ArchitectureDataModule, ArchitectureTable


class ToyTable(ArchitectureDataModule):
    """200 candidates of four tokens; the first 120 are the pool."""

    name = "toy"

    def __init__(self, table: ArchitectureTable | None = None, **options: Any) -> None:
        settings = {"target": "score", "low_fidelity": ["a", "b"], "labels": 12, "higher_is_better": True}
        super().__init__(**{**settings, "pretrain_steps": 6, "batch_size": 32, **options})
        self.table = table or toy_table()

    def read_table(self) -> ArchitectureTable:
        return self.table


def toy_table(columns: int = 2) -> ArchitectureTable:
    """The target is a weighted sum of the tokens; the columns are the target with noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cartesian_prod(*[torch.arange(4)] * 4)[torch.randperm(256, generator=generator)[:200]]
    target = (tokens * torch.tensor([3.0, 2.0, 1.0, 0.3])).sum(1)
    noise = torch.randn(200, columns, generator=generator)
    return ArchitectureTable(tokens, (4,) * 4, target, target[:, None] + 2 * noise, torch.arange(200) < 120)
