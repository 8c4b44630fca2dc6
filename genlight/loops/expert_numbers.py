"""How many experts a model may keep: what can route, and what keeps limits on its size and its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from genlight.errors import UserError
from genlight.experts.families import check_count

if TYPE_CHECKING:
    from genlight.loops.expert_work import ExpertWork

LIMITS = ("parameters", "bytes", "ms_per_token")


def numbers_of(editor: Any, asked: Sequence[int], per_token: Callable[[int], int]) -> list[int]:
    """The numbers of experts that were asked for, or all that the model can route with, the largest first.

    Args:
        editor: of the model.
        asked: none: all.
        per_token: experts of a token by number of experts.

    Raises:
        ValueError: one of those asked for is beyond the model's, or cannot route.
    """

    def check(number: int) -> None:
        if number > editor.num_experts:
            raise ValueError(f"num_experts = {number} must be at most {editor.num_experts}, the model's")
        check_count(number, replace(editor.own_routing, num_experts_per_tok=per_token(number)), editor.family)

    found = []
    for number in sorted(asked, reverse=True) or range(editor.num_experts, 0, -1):
        with suppress(*() if asked else (ValueError,)):
            check(number)
            found.append(number)
    return found


def within_limits(works: Sequence[ExpertWork], limits: Mapping[str, float], most_only: bool) -> list[ExpertWork]:
    """Those whose models keep all limits.

    Args:
        works: from the most experts to the fewest.
        limits: upper, by name out of `LIMITS`.
        most_only: the first that does suffices.

    Raises:
        UserError: none does.
    """
    if not limits:
        return list(works)
    found: list[ExpertWork] = []
    size: dict[str, float] = {}
    for work in works:
        size = work.size(timed="ms_per_token" in limits)
        if all(size[name] <= limit for name, limit in limits.items()):
            found.append(work)
            if most_only:
                break
    if not found:
        least = ", ".join(f"{name} = {size[name]:.4g}" for name in limits)
        raise UserError(
            f"method.limits = {dict(limits)}: with {works[-1].num_experts} experts a model has {least} still"
        )
    return found
