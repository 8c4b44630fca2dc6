"""Members of a zoo that raise while schedules are measured: whose fault it is, and a search that goes on without them.

The archive says it: a schedule that failed for a member has a failure of kind `records.PART` and the name of the member
among its facts. What is proposed next is a function of that, so that a resumed search leaves out the same members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from genlight.errors import UserError
from genlight.search.evaluation import Evaluator
from genlight.search.protocols import Strategy
from genlight.search.records import PART, Failure, History, Outcome, Problem, Proposal, Record, Trial

# the fact that names the member
MEMBER = "member"


class TellsFailed(Protocol):
    """What calls the members, and knows which of them raised (`ScheduledDenoiser`)."""

    failed: str | None


def naming_members(evaluate: Evaluator[Any], members: TellsFailed) -> Evaluator[Any]:
    """The evaluator, with the failures that a member's call raised written down as that member's."""

    def named(trials: Sequence[Trial[Any]]) -> list[Outcome]:
        outcomes = []
        for trial in trials:
            members.failed = None
            (outcome,) = evaluate([trial])
            if outcome.failure is not None and members.failed is not None:
                failure = Failure(PART, outcome.failure.reason)
                outcome = replace(outcome, facts={**outcome.facts, MEMBER: members.failed}, failure=failure)
            outcomes.append(outcome)
        return outcomes

    return named


def failed_member(record: Record[Any]) -> tuple[str, str] | None:
    """(name, reason) of the member for which a candidate failed; None where no member did."""
    if record.failure is None or record.failure.kind != PART:
        return None
    return str(record.facts[MEMBER]), record.failure.reason


def failed_members(records: Sequence[Record[Any]]) -> dict[str, str]:
    """Why each member that failed did so first, by name."""
    found: dict[str, str] = {}
    for name, reason in filter(None, map(failed_member, records)):
        found.setdefault(name, reason)
    return found


@dataclass(frozen=True)
class WithoutFailed:
    """A strategy that, from the next generation on, neither proposes nor looks at schedules with a member that failed.

    Attributes:
        strategy: proposes.
        lowest: the smallest budget, which the members that are left must be able to keep.
    """

    strategy: Strategy[Any]
    lowest: float

    def ask(self, problem: Problem[Any], history: History[Any]) -> list[Proposal[Any]]:
        """What the strategy proposes. UserError where the members that are left cannot keep the smallest budget."""
        failed = failed_members(history.records)
        if not failed:
            return self.strategy.ask(problem, history)
        space: Any = problem.space
        try:
            space = space.without(failed)
            space.with_budget(self.lowest)
        except ValueError as error:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
            raise UserError(f"the search cannot go on without the members that failed, {reasons}: {error}") from error
        rest = history.keeping(lambda record: not failed.keys() & set(record.candidate.members))
        return self.strategy.ask(replace(problem, space=space), rest)
