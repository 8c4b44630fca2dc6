"""Three small tasks with nothing to download, which a language model of half a million parameters learns in minutes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genlight.data.digits import _read_digits
from genlight.data.sampling import generator
from genlight.data.text_sources import Row
from genlight.data.text_tasks import TextTaskDataModule
from genlight.data.tokenizer import character_tokenizer

MAX_LENGTH = 64
SHARES: Mapping[str, float] = {"train": 0.5, "search": 0.15, "select": 0.1, "report": 0.25}
_SEED = 2407  # of what is drawn here; fixed, so that the tasks are the same in every run
_WHITE = 8  # least of the 17 levels of grey that counts as white
_SORT_ROWS, _SORT_LETTERS = 9000, 8
_CONTEXT, _CONTINUATION, _CHOICES, _BLOCK = 32, 12, 4, 440
WORDS = ("<digit>", "<sort>", "<text>", *(f"<p{pattern}>" for pattern in range(16)))

TASKS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "kind": "classification",
        "prompt": "<digit>{pixels}=",
        "choices": tuple("0123456789"),
        "answer": "digit",
        "answer_prefix": "",
        "group": "image",
        "altered": "moved",
    },
    "text": {
        "kind": "multiple_choice",
        "prompt": "<text>{text}",
        "choices": "continuations",
        "answer": "right",
        "answer_prefix": "",
        "group": "block",
        "altered": "overlapping",
    },
    "sort": {
        "kind": "generation",
        "prompt": "<sort>{letters}=",
        "answer": "sorted",
        "answer_prefix": "",
        "max_new_tokens": _SORT_LETTERS + 1,
        "normalise": False,
    },
}


class TinyTasksDataModule(TextTaskDataModule):
    """Digits, text and sorting, for a tiny mixture of experts.

    - digits: scikit-learn's handwritten digits in black and white, sixteen tokens for half a row of four pixels each;
      ten classes. Images moved by one pixel are altered copies.
    - text: 32 characters of the language reference that Python brings along (`pydoc_data.topics`, so its text follows
      Python's version), of which four continuations of 12 characters is the right one?
    - sort: eight capital letters, to be written in the order of the alphabet.

    The tokenizer has a token for each printable character and for each pattern of four pixels.

    Args:
        tasks: names of the tasks to train on and to measure.
        evaluate, shares, batch_size, eval_batch_size, num_samples, seed, draw: as in `TextTaskDataModule`.

    Raises:
        ValueError: a value out of range, or an unknown task.
    """

    name = "tiny_tasks"

    def __init__(
        self,
        tasks: Sequence[str] = tuple(TASKS),
        evaluate: Sequence[str] | None = None,
        shares: Mapping[str, float] = SHARES,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_samples: int | None = None,
        seed: int = 0,
        draw: str = "report",
    ) -> None:
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"data.tasks names {', '.join(unknown)}; there are {', '.join(TASKS)}")
        super().__init__(
            {name: TASKS[name] for name in tasks},
            None,
            evaluate,
            shares,
            MAX_LENGTH,
            False,
            batch_size,
            eval_batch_size,
            num_samples,
            seed,
            draw,
        )

    def read_rows(self, name: str) -> Sequence[Row]:
        """The rows of a task, made anew at each call."""
        return {"digits": digit_rows, "text": text_rows, "sort": sort_rows}[name]()

    def load_tokenizer(self) -> Any:
        """The tokenizer of the three tasks."""
        return character_tokenizer(WORDS, MAX_LENGTH)


def digit_rows() -> list[Row]:
    """1,797 images, then the same moved by a pixel to their eight sides, black where nothing moves in.

    What equals an earlier one in black and white is left out: it would stand in two splits.
    """
    digits = _read_digits()
    padded = np.pad(digits[:, :64].reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    rows: dict[str, Row] = {}
    for down, right in itertools.product((1, 0, 2), repeat=2):
        white = padded[:, down : down + 8, right : right + 8].reshape(-1, 16, 4) >= _WHITE
        for number, patterns in enumerate((white @ (8, 4, 2, 1)).tolist()):
            pixels = "".join(f"<p{pattern}>" for pattern in patterns)
            moved = (down, right) != (1, 1)
            row = {"image": number, "pixels": pixels, "digit": str(digits[number, 64]), "moved": moved}
            rows.setdefault(pixels, row)
    return list(rows.values())


def text_rows() -> list[Row]:
    """Windows of 44 characters of Python's language reference, every second of which overlaps with its neighbours.

    Blocks of 440 characters stay in one split; the wrong continuations come from anywhere.
    """
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore").decode().split()
    text, length = " ".join(words), _CONTEXT + _CONTINUATION
    starts = [
        block + inner
        for block in range(0, len(text) - _BLOCK + 1, _BLOCK)
        for inner in range(0, _BLOCK - length + 1, length // 2)
    ]
    windows = [text[start : start + length] for start in starts]
    rng = generator(_SEED, 0)
    rows: list[Row] = []
    for number, window in enumerate(windows):
        offsets = rng.choice(len(windows) - 1, _CHOICES - 1, replace=False) + 1
        others = [windows[(number + int(offset)) % len(windows)][_CONTEXT:] for offset in offsets]
        right = int(rng.integers(_CHOICES))
        continuations = [*others[:right], window[_CONTEXT:], *others[right:]]
        block, inner = divmod(starts[number], _BLOCK)
        row = {"text": window[:_CONTEXT], "continuations": continuations, "right": right}
        rows.append({**row, "block": block, "overlapping": inner % length != 0})
    return rows


def sort_rows() -> list[Row]:
    """Random capital letters and the same in alphabetical order."""
    drawn = generator(_SEED, 1).integers(ord("A"), ord("Z") + 1, (_SORT_ROWS, _SORT_LETTERS))
    return [{"letters": "".join(map(chr, line)), "sorted": "".join(map(chr, sorted(line)))} for line in drawn.tolist()]
