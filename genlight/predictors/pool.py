"""A pool of candidates with low-fidelity scores: what can be known of them before one is measured."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)
# what the values of each token are called
Categories = tuple[tuple[str, ...], ...]
REAL = 0  # in the place of a vocabulary: the token is a real number
_FAILED = 1e8  # ± this stands for "failed" in published tables


@dataclass(frozen=True)
class Pool:
    """Candidates and their low-fidelity scores.

    Attributes:
        tokens: int64 [N, T]; floating point where some are real numbers.
        vocabulary: number of values of each token, 0 (`REAL`) for a real number.
        low_fidelity: float32 [N, E], NaN where a score is missing; E may be 0.
        names: of the E scores.
        categories: what the values of each token are called, in the order of their numbers, none where they are
            numbers; empty: no token has names.

    Raises:
        ValueError: shapes that do not fit, tokens outside the vocabulary, a name that stands twice.
    """

    tokens: Tensor
    vocabulary: tuple[int, ...]
    low_fidelity: Tensor
    names: tuple[str, ...]
    categories: Categories = ()

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.vocabulary)
        if self.low_fidelity.shape != (len(self.tokens), len(self.names)):
            raise ValueError(
                f"low_fidelity has the shape {list(self.low_fidelity.shape)}; {len(self.tokens)} candidates with "
                f"{len(self.names)} scores need [{len(self.tokens)}, {len(self.names)}]"
            )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"low_fidelity names {', '.join(twice)} twice")


def check_tokens(tokens: Tensor, vocabulary: Sequence[int]) -> None:
    """ValueError if tokens [N, T] have another T than the vocabulary, or one lies outside its values."""
    if tokens.ndim != 2 or tokens.shape[1] != len(vocabulary):
        raise ValueError(f"tokens have the shape {list(tokens.shape)}; the vocabulary is of {len(vocabulary)} places")
    sizes = torch.tensor(vocabulary, device=tokens.device)
    outside = torch.where(sizes == REAL, ~tokens.isfinite(), (tokens < 0) | (tokens >= sizes))
    if bool(outside.any()):
        row, place = (int(number) for number in outside.nonzero()[0])
        raise ValueError(
            f"token {place} of row {row} is {int(tokens[row, place])}; its vocabulary is 0 to {vocabulary[place] - 1}"
        )


def cleaned(values: Tensor) -> Tensor:
    """The values with NaN for what only says that something failed: infinities, 1e8 and -1e8."""
    return values.masked_fill(~values.isfinite() | (values.abs() == _FAILED), torch.nan)


def useful_columns(names: Sequence[str], low_fidelity: Tensor) -> list[int]:
    """Numbers of the columns of scores [N, E] that tell candidates apart; the log says which others there are.

    A warning also names columns that are known for less than half of the candidates.

    Raises:
        ValueError: there are columns, and none is useful.
    """
    kept = []
    for number, (name, column) in enumerate(zip(names, low_fidelity.T)):
        known = column[~column.isnan()]
        if len(known.unique()) < 2:
            log.warning("low fidelity %s is left out: it has %s", name, "one value" if len(known) else "no values")
            continue
        if len(known) < len(column) / 2:
            log.warning("low fidelity %s is known for %d of %d candidates only", name, len(known), len(column))
        kept.append(number)
    if len(names) and not kept:
        raise ValueError(f"of low_fidelity = {', '.join(names)} no column has two values")
    return kept


@dataclass(frozen=True)
class Standardiser:
    """Columns minus their mean, by their deviation; float [d] each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Standardiser":
        """Of values [N, d], NaN left out; a column that never changes keeps its scale."""
        exact = values.double()  # single precision holds scores whose squares it does not
        mean = exact.nanmean(dim=0)
        std = (exact - mean).square().nanmean(dim=0).sqrt()
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        return cls(mean.nan_to_num(0.0).to(values.dtype), std.to(values.dtype))

    def __call__(self, values: Tensor) -> Tensor:
        """Values [n, d] standardised; what is missing becomes the mean, 0."""
        return ((values - self.mean) / self.std).nan_to_num(0.0)
