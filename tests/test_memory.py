"""Work in parts that fit into memory."""

import warnings

import pytest
import torch

from genlight.memory import Halves


def squares(room: int, tried: list[int]):
    def work(part: slice) -> torch.Tensor:
        tried.append(part.stop - part.start)
        if tried[-1] > room:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return torch.arange(11)[part] ** 2

    return work


def test_parts_are_halved_for_good_and_all_rows_come_once() -> None:
    halves, tried = Halves(), []
    with pytest.warns(UserWarning, match=r"ran out: 2 of 8 samples at a time from now on \(data.eval_batch_size"):
        parts = list(halves.parts(11, squares(3, tried), most=8))
    assert torch.equal(torch.cat([found for _, found in parts]), torch.arange(11) ** 2)
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1] and halves.rows == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(halves.parts(4, squares(3, tried)))) == 2


def test_work_is_begun_anew_and_one_row_that_does_not_fit_is_an_error() -> None:
    tried: list[int] = []

    def work(rows: int) -> int:
        tried.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return rows

    halves, room = Halves("rows of a call", ""), 0
    with pytest.raises(torch.OutOfMemoryError):
        halves.attempt(work, 6)
    assert tried == [6, 3, 1] and halves.rows is None
    room = 3
    with pytest.warns(UserWarning, match="3 of 6 rows of a call at a time from now on$"):
        assert halves.attempt(work, 6) == 3
    assert halves.attempt(work, 6) == 3 and halves.attempt(work, 2) == 2
