"""Sampling in a few steps with students that are plain functions: what is kept, what is said again, what is refused."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from genlight.nets.few_step import check_timesteps, ends_of, few_steps

SIZES = (1, 2, 3)
CODES, DIM = 5, 2


class Oracle:
    """Token i is a fixed function of the tokens before its group and of its own noise, as the flow of a teacher is."""

    group_sizes = SIZES

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook
        self.seen: list[tuple[Tensor, Tensor]] = []

    def truth(self, vectors: Tensor, is_data: Tensor) -> Tensor:
        tokens = torch.zeros(vectors.shape[:2], dtype=torch.long)
        ends = ends_of(SIZES)
        for group in range(len(SIZES)):
            before = tokens[:, : ends[group]].sum(1)
            for place in range(ends[group], ends[group + 1]):
                given = torch.cdist(vectors[:, place], self.codebook).argmin(-1)
                said = ((vectors[:, place, 0] * 7).floor().long() + before) % CODES
                tokens[:, place] = torch.where(is_data[:, place], given, said)
        return tokens

    def __call__(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((vectors, is_data))
        logits = functional.one_hot(self.truth(vectors, is_data), CODES).float()
        return logits, vectors + 100


@pytest.fixture
def case() -> tuple[Oracle, Tensor, Tensor]:
    torch.manual_seed(0)
    return Oracle(torch.randn(CODES, DIM)), torch.randn(4, 6, DIM), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("timesteps", [(0,), (0, 1), (0, 2), (0, 1, 2)])
def test_an_exact_student_gives_the_same_tokens_in_any_steps(
    case: tuple[Oracle, Tensor, Tensor], timesteps: tuple[int, ...]
) -> None:
    oracle, noise, labels = case
    wanted = oracle.truth(noise, torch.zeros(4, 6, dtype=torch.bool))
    oracle.seen.clear()
    found = few_steps(oracle, oracle.codebook, noise, labels, timesteps)
    assert torch.equal(found.tokens, wanted)
    assert torch.equal(found.vectors, oracle.codebook[wanted])
    assert len(oracle.seen) == len(timesteps)
    ends = ends_of(SIZES)
    for (vectors, is_data), step in zip(oracle.seen, timesteps, strict=True):
        # the codes that were said, then the very noise of the first pass
        assert is_data.sum() == 4 * ends[step] and is_data[:, : ends[step]].all()
        assert torch.equal(vectors[:, ends[step] :], noise[:, ends[step] :])
        assert torch.equal(vectors[:, : ends[step]], oracle.codebook[wanted[:, : ends[step]]])


def test_groups_from_the_split_on_are_vectors_of_the_last_pass(case: tuple[Oracle, Tensor, Tensor]) -> None:
    oracle, noise, labels = case
    found = few_steps(oracle, oracle.codebook, noise, labels, (0,), split_timestep=1)
    assert torch.equal(found.vectors[:, :1], oracle.codebook[found.tokens[:, :1]])
    assert torch.equal(found.vectors[:, 1:], noise[:, 1:] + 100)
    # what a later pass was given as codes stays codes
    two = few_steps(oracle, oracle.codebook, noise, labels, (0, 2), split_timestep=0)
    assert torch.equal(two.vectors[:, :3], oracle.codebook[two.tokens[:, :3]])
    assert torch.equal(two.vectors[:, 3:], noise[:, 3:] + 100)


def test_tokens_that_are_given_stay(case: tuple[Oracle, Tensor, Tensor]) -> None:
    oracle, noise, labels = case
    given = torch.tensor([[4, 3, 2]]).expand(4, -1)
    found = few_steps(oracle, oracle.codebook, noise, labels, (2,), tokens=given)
    assert torch.equal(found.tokens[:, :3], given)
    is_data = torch.arange(6).expand(4, -1) < 3
    mixed = torch.where(is_data[..., None], oracle.codebook[functional.pad(given, (0, 3))], noise)
    assert torch.equal(found.tokens, oracle.truth(mixed, is_data))


def test_wrong_arguments_are_named(case: tuple[Oracle, Tensor, Tensor]) -> None:
    oracle, noise, labels = case
    for timesteps in ([], [1, 0], [0, 0], [0, 3], [-1]):
        with pytest.raises(ValueError, match=r"module\.timesteps"):
            check_timesteps(timesteps, 3, "module.timesteps")
    for timesteps in ((), (0, 3), (2, 1)):
        with pytest.raises(ValueError, match="timesteps"):
            few_steps(oracle, oracle.codebook, noise, labels, timesteps)
    with pytest.raises(ValueError, match="split_timestep = 4"):
        few_steps(oracle, oracle.codebook, noise, labels, split_timestep=4)
    with pytest.raises(ValueError, match="must be the 1 before"):
        few_steps(oracle, oracle.codebook, noise, labels, (1,), tokens=torch.zeros(4, 2, dtype=torch.long))
