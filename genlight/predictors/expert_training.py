"""The two steps of DELE without a trainer: experts on low-fidelity scores of a pool, then all on what was measured.

Zhao et al., AAAI 2023 (arXiv 2302.00932): the same pairwise loss in both steps, Adam with a constant rate, the last
weights count.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
from genlight.predictors.pool import Pool

_KEPT = 32_000_000  # bytes, below the largest block that glibc counts


@dataclass(frozen=True)
class ExpertTraining:
    """Length and rate of both steps.

    Attributes:
        pretrain_steps: gradient steps on the pool.
        finetune_steps: gradient steps on what was measured.
        batch_size: candidates of one step at most.
        lr: learning rate of Adam.
    """

    pretrain_steps: int = 600
    finetune_steps: int = 200
    batch_size: int = 512
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.pretrain_steps, self.finetune_steps) < 0 or self.batch_size < 2 or not self.lr > 0:
            raise ValueError(f"steps must not be negative, batch_size at least 2 and lr positive: {self}")


def pretrain(settings: ExpertSettings, training: ExpertTraining, pool: Pool, seed: int) -> ExpertEnsemble:
    """A new network whose experts are trained on the scores of the pool; with no scores, one untrained expert.

    A function of its arguments: neither the global random state counts, nor does it change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 * seed)
        network = ExpertEnsemble(settings, pool.vocabulary, max(1, len(pool.names)))
        torch.manual_seed(2 * seed + 1)  # batches and pairs are the same for any gate
        if pool.names:
            loss = _expert_loss(network, pool)
            _train(network, loss, len(pool.tokens), training, training.pretrain_steps)
    return network.eval()


def finetune(
    network: ExpertEnsemble, training: ExpertTraining, tokens: Tensor, targets: Tensor, seed: int
) -> ExpertEnsemble:
    """A copy with a new gate, all of its parameters trained on the order of the targets.

    Args:
        tokens: int64 [n, T].
        targets: float [n], higher is better.
        seed: of gate, batches and pairs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 * seed)
        tuned = copy.deepcopy(network)
        tuned.reset_gate()
        torch.manual_seed(2 * seed + 1)
        _train(
            tuned,
            lambda rows: tuned.fusion_loss(tokens[rows], targets[rows]),
            len(tokens),
            training,
            training.finetune_steps,
        )
    return tuned.eval()


def _expert_loss(network: ExpertEnsemble, pool: Pool) -> Callable[[Tensor], Tensor]:
    return lambda rows: network.expert_losses(pool.tokens[rows], pool.low_fidelity[rows]).sum()


def _train(
    network: ExpertEnsemble, loss: Callable[[Tensor], Tensor], count: int, training: ExpertTraining, steps: int
) -> None:
    """Adam on the loss of a batch of rows; epochs are permutations, an incomplete last batch is left out."""
    # glibc keeps twice the largest block that was freed so far, up to 64 MB, and gives the rest back to the system: to
    # get it anew costs each step of small networks a sixth of its time
    torch.empty(_KEPT, dtype=torch.uint8)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.lr, fused=True)
    network.train()
    size = min(training.batch_size, count)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.split(torch.randperm(count)[: count // size * size], size))
        optimizer.zero_grad()
        torch.autograd.backward(loss(batches.pop()))
        optimizer.step()
