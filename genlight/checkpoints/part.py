"""The first members of a trajectory, as if the training had ended there."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from genlight.checkpoints.mixing import Checkpoints
from genlight.errors import UserError


@dataclass(frozen=True, eq=False)
class TrajectoryPart:
    """Members of `whole` up to an optimizer step; differences are to the newest of them.

    Raises:
        UserError: fewer than two members; the message names the steps that there are.
    """

    whole: Checkpoints
    until: int

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            steps = [member.last_step for member in self.whole.members]
            raise UserError(
                f"method.until={self.until}: {len(self.members)} of the {len(steps)} saved checkpoints lie before it "
                f"(they are from step {steps[0]} to {steps[-1]}); two or more are needed"
            )

    @cached_property
    def members(self) -> tuple[Any, ...]:
        """Oldest first."""
        return tuple(member for member in self.whole.members if member.last_step <= self.until)

    @property
    def names(self) -> Any:
        """Of the parameters."""
        return self.whole.names

    @property
    def shapes(self) -> Any:
        """By parameter."""
        return self.whole.shapes

    @property
    def fingerprint(self) -> str:
        """Of the whole, and how far it is read."""
        return f"{self.whole.fingerprint}/{len(self.members)}"

    @property
    def damaged(self) -> Any:
        """Why members of the whole were left out."""
        return getattr(self.whole, "damaged", ())

    def read(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member, float32 on the CPU."""
        return self.whole.read(range(len(self.members))[index], name)

    def read_difference(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member minus that of the newest member, float32 on the CPU."""
        return self.read(index, name) - self.read(-1, name)
