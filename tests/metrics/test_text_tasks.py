"""Means by task against hand values, and the same from two processes as from one."""

import pytest
import torch

from genlight.metrics.text_tasks import TaskScores, answer_f1, exact_match, extracted

TASK = torch.tensor([0, 1, 0, 2, 1, 0])
RIGHT = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])


def add(scores: TaskScores, part: slice) -> None:
    scores.update(TASK[part], "accuracy", RIGHT[part])
    scores.update(TASK[part], "log_likelihood", -TASK[part] - 0.5)
    scores.update(TASK[part][RIGHT[part] > 0], "f1", RIGHT[part][RIGHT[part] > 0] / 4)


def test_means_are_those_of_the_questions_and_then_of_the_tasks() -> None:
    scores = TaskScores(["a", "b", "c"])
    for part in (slice(0, 1), slice(1, 6)):
        add(scores, part)
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found["a/accuracy"] == pytest.approx(2 / 3) and found["b/accuracy"] == 0.5 and found["c/accuracy"] == 1.0
    assert found["accuracy"] == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert found["b/log_likelihood"] == -1.5 and found["log_likelihood"] == -1.5
    assert found["c/f1"] == 0.25 and not {"f1", "a/exact_match"} & set(found)
    scores.reset()
    add(scores, slice(3, 4))
    assert set(scores.compute()) == {"c/accuracy", "c/log_likelihood", "c/f1", "accuracy", "log_likelihood"}
    with pytest.raises(ValueError, match="there are none"):
        TaskScores([])


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = TaskScores(["a", "b", "c"])
    add(scores, slice(rank, None, 2))
    merged = [float(value) for value in scores.compute().values()]
    alone = TaskScores(["a", "b", "c"])
    alone.sync = False
    if rank == 0:  # must not wait for the other
        add(alone, slice(0, None, 2))
        merged.append(float(alone.compute()["a/accuracy"]))
    torch.tensor(merged, dtype=torch.float64).numpy().tofile(f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path) -> None:
    torch.set_num_threads(1)  # so that forked children may compute
    torch.multiprocessing.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    scores = TaskScores(["a", "b", "c"])
    add(scores, slice(None))
    expected = torch.stack(list(scores.compute().values()))
    for rank in range(2):
        size = len(expected) + (rank == 0)
        found = torch.from_file(f"{tmp_path}/{rank}", size=size, dtype=torch.float64)
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-12, atol=0)
        if rank == 0:
            assert found[-1] == 0.5


@pytest.mark.parametrize(
    ("answer", "references", "match", "exact", "f1"),
    [
        ("The cat.", ["cat"], 1, 0, 1.0),
        (" cat ", ["dog", "cat"], 1, 1, 1.0),
        ("black cat", ["cat"], 0, 0, 2 / 3),
        ("a cat sat", ["cat sat down here"], 0, 0, 2 / 3),
        ("", ["cat"], 0, 0, 0.0),
        ("-5", ["5"], 1, 0, 1.0),
        ("dog", ["cat"], 0, 0, 0.0),
        ("cat cat", ["cat"], 0, 0, 2 / 3),
    ],
)
def test_written_answers_against_hand_values(answer, references, match, exact, f1) -> None:
    assert exact_match(answer, references, normalise=True) == match
    assert exact_match(answer, references, normalise=False) == exact
    assert answer_f1(answer, references) == pytest.approx(f1)


def test_the_last_match_is_extracted() -> None:
    number = r"####\s*(-?[\d.,]+)"
    assert extracted("3 + 4 = 7\n#### 7\n#### -1,234", number) == "-1,234"
    assert (
        extracted("so 3 and 4", r"\d+") == "4" and extracted("none", r"\d+") is None and extracted("a b", None) == "a b"
    )
    assert exact_match("1,234", ["1234"], normalise=True) == 1.0
