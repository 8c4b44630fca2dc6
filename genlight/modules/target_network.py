"""The target of consistency training: a second set of weights that follows the student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.modules.exported_pipeline import Network
from genlight.trainer.resident import is_sharded


class TargetNetwork:
    """A copy of the student, made when it is first asked for: before the first step of a fit, or after a resume.

    It is no submodule: so it stays out of the optimizer, of averages and of the weights that are saved, and an averaged
    copy of the module shares it. Where the student is in 16 bits, the average is kept in float32 beside the network:
    what a step adds to it would be rounded away.

    Args:
        stored: its weights in a checkpoint; None begins with the student's.
    """

    def __init__(self, stored: Mapping[str, Tensor] | None = None) -> None:
        self.network: Network | None = None
        self._stored = stored
        self._exact: dict[str, Tensor] = {}  # of the parameters in 16 bits

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetNetwork:
        return self

    def of(self, student: Network, compiled: bool = False) -> Network:
        """The target of a student, on its device and in its mode."""
        if self.network is None:
            target = copy.deepcopy(student).requires_grad_(False)
            stored = self._stored or {}
            self._exact = {
                name: stored.get(name, weight).detach().float()
                for name, weight in target.named_parameters()
                if weight.dtype.itemsize < 4
            }
            if stored:
                target.load_state_dict(stored)
            if compiled:
                target.compile()
            self.network, self._stored = target, None
        device = next(student.parameters()).device
        if next(self.network.parameters()).device != device:
            self.network.to(device)
            self._exact = {name: value.to(device) for name, value in self._exact.items()}
        if self.network.training != student.training:
            self.network.train(student.training)
        return self.network

    @torch.no_grad()
    def follow(self, student: Network, decay: float) -> None:
        """Become decay · target + (1 - decay) · student; buffers are copied."""
        target = self.of(student)
        mine = [self._exact.get(name, weight) for name, weight in target.named_parameters()]
        theirs = [weight.detach().to(own.dtype) for weight, own in zip(student.parameters(), mine, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for name, value in self._exact.items():
            target.get_parameter(name).copy_(value)
        for mine, other in zip(target.buffers(), student.buffers(), strict=True):
            mine.copy_(other)

    def state(self) -> dict[str, Tensor] | None:
        """Weights for a checkpoint; None where there is no target yet."""
        if self.network is None:
            return None if self._stored is None else dict(self._stored)
        return {name: value.clone() for name, value in {**self.network.state_dict(), **self._exact}.items()}


def refuse_shards(trainer: Trainer, key: str) -> None:
    """UserError, naming the config key of its decay, where no process holds the whole student that a target copies."""
    if is_sharded(trainer):
        raise UserError(
            f"{key} above 0 keeps a second set of weights, which a sharded strategy cannot hold: set it to 0, or "
            "strategy=ddp"
        )


def has_stepped(trainer: Trainer) -> bool:
    """Whether `optimizer_step` ends an optimizer step; strategies that accumulate by themselves get all batches."""
    return not trainer.fit_loop._should_accumulate()


@contextmanager
def repeatable(device: torch.device, network: nn.Module) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Yields a context in which torch draws again the numbers it draws from here; of no cost where nothing is dropped.

    So the target drops the same units as the student (Song et al. 2023, appendix C).
    """
    drops = network.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in network.modules())
    before = _random_states(device) if drops else []

    @contextmanager
    def replay() -> Iterator[None]:
        after = _random_states(device) if drops else []
        _restore(device, before)
        try:
            yield
        finally:
            _restore(device, after)

    yield replay


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore(device: torch.device, states: list[Tensor]) -> None:
    if states:
        torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
