"""A student with passes of its teacher, and rivals without a student: exact where they must be."""

import itertools

import pytest
import torch
from nets.test_teachers import CLASSES, CODES, make, randomised
from torch import Tensor

from genlight.diffusion.flow_codes import flow_choice
from genlight.diffusion.teacher_passes import Marginals, drawn_choice, refine, stopped_early, teacher_involved
from genlight.metrics.tokens import negative_log_likelihood
from genlight.nets.autoregressive import AutoregressiveModel, SamplingSettings, decode
from genlight.nets.dd_student import Student, student_of
from genlight.nets.few_step import ends_of, few_steps

SETTINGS = SamplingSettings(guidance_scale=1.5, top_k=12)
KINDS = ("llamagen", "var")


def case(kind: str) -> tuple[AutoregressiveModel, Student, Tensor, Tensor, Tensor]:
    """Teacher, student, noise, labels, and the tokens that the teacher makes of them group by group."""
    teacher = make(kind)
    student = student_of(teacher).eval()
    randomised(student)
    length, dim = sum(teacher.group_sizes), teacher.codebook.shape[1]
    noise = torch.randn(8, length, dim, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(8) % CLASSES
    chain = decode(teacher, labels, SETTINGS, flow_choice(noise, teacher.codebook, teacher.group_sizes))
    return teacher, student, noise, labels, chain


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_makes_one_more_group_exact(kind: str) -> None:
    teacher, _, noise, labels, chain = case(kind)
    tokens = torch.randint(0, CODES, chain.shape, generator=torch.Generator().manual_seed(6))
    ends = ends_of(teacher.group_sizes)
    assert (tokens == chain).double().mean() < 0.5
    for end in ends[1:]:
        tokens = refine(teacher, SETTINGS, noise, labels, tokens, 1).tokens
        assert torch.equal(tokens[:, :end], chain[:, :end])
    again = refine(teacher, SETTINGS, noise, labels, tokens, 1)
    assert torch.equal(again.tokens, chain)
    assert torch.equal(again.vectors, teacher.codebook[chain])


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_decides_the_groups_it_is_given(kind: str) -> None:
    teacher, student, noise, labels, chain = case(kind)
    choose = flow_choice(noise, teacher.codebook, teacher.group_sizes)
    groups, ends = len(teacher.group_sizes), ends_of(teacher.group_sizes)
    guess = few_steps(student, teacher.codebook, noise, labels).tokens
    for first, last in itertools.combinations(range(1, groups + 2), 2):
        found = teacher_involved(student, teacher, SETTINGS, noise, labels, choose, first, last)
        head = ends[first - 1]
        assert torch.equal(found.tokens[:, :head], guess[:, :head])
        middle = decode(teacher, labels, SETTINGS, choose, guess[:, :head] if head else None, last - 1)
        assert torch.equal(found.tokens[:, : ends[last - 1]], middle)
        if last <= groups:
            rest = few_steps(student, teacher.codebook, noise, labels, (last - 1,), tokens=middle)
            assert torch.equal(found.tokens, rest.tokens)
        if first == 1:
            assert torch.equal(found.tokens[:, : ends[last - 1]], chain[:, : ends[last - 1]])
        if last <= groups:
            split = teacher_involved(student, teacher, SETTINGS, noise, labels, choose, first, last, groups - 1)
            wanted = few_steps(student, teacher.codebook, noise, labels, (last - 1,), groups - 1, middle)
            assert torch.equal(split.tokens, found.tokens) and torch.equal(split.vectors, wanted.vectors)
            assert torch.equal(split.vectors, found.vectors) == (last == groups + 1)
    for first, last in ((0, 2), (2, 2), (1, groups + 2)):
        with pytest.raises(ValueError, match="first < last"):
            teacher_involved(student, teacher, SETTINGS, noise, labels, choose, first, last)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_does_not_reach_the_teacher(kind: str) -> None:
    """It would make other tokens; what the student's passes are in is not asked here."""
    teacher, student, noise, labels, _ = case(kind)
    noise, labels = torch.randn(200, *noise.shape[1:], generator=torch.Generator().manual_seed(7)), labels.repeat(25)
    choose, groups = flow_choice(noise, teacher.codebook, teacher.group_sizes), len(teacher.group_sizes)
    chain = decode(teacher, labels, SETTINGS, choose)
    likelihood = negative_log_likelihood(teacher, chain, labels, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(decode(teacher, labels, SETTINGS, choose), chain)
        assert torch.equal(refine(teacher, SETTINGS, noise, labels, chain.flip(0), groups).tokens, chain)
        whole = teacher_involved(student, teacher, SETTINGS, noise, labels, choose, 1, groups + 1)
        assert torch.equal(whole.tokens, chain)
        assert torch.equal(negative_log_likelihood(teacher, chain, labels, SETTINGS), likelihood)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Of 40,000 numbers for each of two groups; what has no probability is not drawn, by the least number neither."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [0.7, 0.0, 0.0, 0.1, 0.0, 0.2], [0, 0, 0, 0, 0, 1.0]])
    numbers = torch.rand(40_000, 3, generator=generator)
    numbers[0], numbers[1] = 0, 1 - 2**-24
    choose = drawn_choice(numbers, (1, 2))
    parts = [choose(shares[rows].expand(len(numbers), -1, -1), group) for group, rows in enumerate(([0], [1, 2]))]
    tokens = torch.cat(parts, 1)
    assert tokens[0].tolist() == [1, 0, 5] and tokens[1].tolist() == [4, 5, 5]
    for place, wanted in enumerate(shares):
        found = tokens[:, place].bincount(minlength=6) / len(tokens)
        assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / len(tokens)).sqrt()).all()


def test_independent_tokens_have_the_frequencies_that_were_counted() -> None:
    """Each of 20,000 rows draws three places; the largest gap of 36 frequencies is below five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(6, 3, generator=generator)
    tokens = torch.multinomial(torch.rand(6, generator=generator), 3 * 400, True, generator=generator).view(400, 3)
    labels = torch.arange(400) % 2
    tokens[labels == 1] = (tokens[labels == 1] + 2) % 6
    by_class = Marginals(tokens, 6, labels)
    shares, _ = by_class.frequencies(torch.tensor([1, 0, 1]))
    count = 20_000
    asked = torch.arange(count) % 2
    found = by_class.sample(codebook, torch.randn(count, 3, 3, generator=generator), asked, steps=64)
    for label in (0, 1):
        wanted = torch.stack([(tokens[labels == label] == code).double().mean(0) for code in range(6)], -1)
        torch.testing.assert_close(shares[label].double(), wanted, atol=1e-6, rtol=0)
        rows = found.tokens[asked == label]
        share = torch.stack([(rows == code).double().mean(0) for code in range(6)], -1)
        # the flow's own error at 64 steps beside that of counting
        assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / len(rows)).sqrt() + 0.005).all()
        assert torch.equal(by_class.likeliest(torch.tensor([label]))[0], wanted.argmax(-1))
    together, index = Marginals(tokens, 6).frequencies(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(together, shares.mean(0, keepdim=True))
    assert index.tolist() == [0, 0, 0]
    # independent places: two of them agree as often as their frequencies say
    both = found.tokens[asked == 0]
    expected = (shares[0, 0] * shares[0, 1]).sum()
    assert abs((both[:, 0] == both[:, 1]).double().mean() - expected) < 0.02
    # of the classes of a batch alone, whatever others there are
    assert torch.equal(by_class.frequencies(torch.tensor([1, 1]))[0], shares[1:])
    with pytest.raises(ValueError, match="class 1 must have tokens"):
        Marginals(tokens, 6, labels * 2).likeliest(torch.tensor([0, 1]))


def test_a_teacher_that_stopped_keeps_its_first_groups() -> None:
    tokens, filling = torch.arange(12).view(2, 6), torch.full((2, 6), 99)
    kept = stopped_early(tokens, (1, 2, 3), 2, filling)
    assert kept.tolist() == [[0, 1, 2, 99, 99, 99], [6, 7, 8, 99, 99, 99]]
    assert stopped_early(tokens, (1, 2, 3), 2, None).tolist() == [[0, 1, 2], [6, 7, 8]]
