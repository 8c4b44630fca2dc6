"""Questions as tokens, and batches of them: for the log-likelihood of options, for generation and for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlight.data.text_examples import Example, TextTask
from genlight.errors import UserError
from genlight.metrics.text_tasks import extracted

IGNORED = -100  # the target that losses of transformers leave out


@dataclass(frozen=True)
class Encoded:
    """A question as token numbers: what is given, and how each option goes on."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the longest row that the network sees."""
        return len(self.context) + max(map(len, self.options))


@dataclass(frozen=True)
class Encoder:
    """Text to tokens with a limit.

    Attributes:
        tokenizer: of transformers.
        max_length: most tokens of a question with its answer.
        truncate: cut longer questions at their beginning, behind what stands in front of all text (a token of the
            beginning, the head of a chat); False: they are an error.
        chat: put questions, with the solved examples, into a turn of the user by the tokenizer's chat template. Answers
            begin the turn of the model, without `answer_prefix`.
    """

    tokenizer: Any
    max_length: int
    truncate: bool = False
    chat: bool = False

    @property
    def pad_id(self) -> int:
        """Number of the padding token; masked, so that any will do where there is none."""
        found = self.tokenizer.pad_token_id
        return int(found if found is not None else self.tokenizer.eos_token_id or 0)

    def encode(self, example: Example, task: TextTask, shots: str = "", room: int = 0) -> Encoded:
        """The question after the solved examples `shots`, with all of its options.

        A tokenizer may draw the end of the prompt and the beginning of an answer together. So each option is encoded
        with the prompt in front, and what all of them and the prompt alone, with `answer_prefix`, begin with is the
        context.

        Args:
            room: tokens that must fit after the context, beside the longest option.

        Raises:
            UserError: the question is longer than `max_length`, or has no tokens.
        """
        where = f"data.tasks.{example.task}: the question {example.prompt[:60]!r}"
        prompt, prefix = shots + example.prompt, task.answer_prefix
        if self.chat:
            prompt, prefix = self._framed(prompt), ""
        whole = [self._tokens(prompt + prefix + option) for option in example.options]
        given = self._tokens(prompt + prefix.rstrip(" "))  # a space at its end is drawn to the answer
        start = min(_common(given, ids) for ids in whole)
        context, options = whole[0][:start], tuple(ids[start:] for ids in whole)
        if not context or not all(options):
            raise UserError(f"{where} or an answer to it has no tokens")
        longest = max(room, *map(len, options))
        excess = max(len(context) + longest - self.max_length, 0)
        head = _common(context, self._tokens(self._framed("") if self.chat else "")) if excess else 0
        if excess and (not self.truncate or head + excess >= len(context)):
            raise UserError(
                f"{where} takes {len(context) + longest} tokens with its answer, data.max_length = {self.max_length}"
                + ("" if self.truncate else ": raise it, or set data.truncate=true to cut the beginning of prompts")
            )
        return Encoded(context[:head] + context[head + excess :], options)

    def _framed(self, prompt: str) -> str:
        """The prompt as a turn of the user, and the beginning of the model's."""
        turns = [{"role": "user", "content": prompt}]
        framed: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return framed

    def _tokens(self, text: str) -> tuple[int, ...]:
        # a chat template writes the tokens that stand before all text itself
        return tuple(self.tokenizer(text, add_special_tokens=not self.chat).input_ids)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, int64 [R, T] each; rows end together, so that the last tokens stand in one column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def scoring_batch(questions: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Rows for the network and where it must be read to know the log-likelihood of every option of B questions.

    Options that see the same tokens share a row: of one-token options there is one row for each question.

    Returns:
        input_ids, attention_mask [R, T]: the rows, padded to the left.
        option_row [O]: the row of each option.
        option_targets [O, M]: its tokens, at the end, after `IGNORED`; the last M positions of the row predict them.
        option_place [O, 2]: number of the question in the batch, and of the option in the question.
    """
    rows: dict[tuple[int, ...], int] = {}
    places, row_numbers, targets = [], [], []
    for number, question in enumerate(questions):
        for slot, option in enumerate(question.options):
            row = question.context + option[:-1]
            row_numbers.append(rows.setdefault(row, len(rows)))
            places.append((number, slot))
            targets.append(option)
    width = max(map(len, targets))
    ids, mask = left_padded(list(rows), pad_id)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "option_row": torch.tensor(row_numbers),
        "option_targets": torch.tensor([[IGNORED] * (width - len(option)) + list(option) for option in targets]),
        "option_place": torch.tensor(places),
    }


class EvaluationQuestions:
    """Batches of questions for validation; the i-th question is asked for by its number i in the draw.

    A batch is that of `scoring_batch` with, for each of B questions, index [B], task [B] (number of the task in
    `task_names`), label [B] and option_length (characters [O]); of generated answers also ``generation``: input_ids and
    attention_mask [B, T] of the prompts, and the lists references (what is compared of
    them), extract, stop, max_new_tokens and normalise.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoded: Callable[[int], Encoded],
        tasks: dict[str, TextTask],
        pad_id: int,
    ) -> None:
        self.examples, self.encoded, self.tasks, self.pad_id = examples, encoded, tasks, pad_id
        self._numbers = {name: number for number, name in enumerate(tasks)}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        examples = [self.examples[index] for index in indices]
        questions = [self.encoded(int(index)) for index in indices]
        batch: dict[str, Any] = scoring_batch(questions, self.pad_id)
        batch["index"] = torch.as_tensor(indices)
        batch["task"] = torch.tensor([self._numbers[example.task] for example in examples])
        batch["label"] = torch.tensor([example.label for example in examples])
        lengths = [len(option.strip()) for example in examples for option in example.options]
        batch["option_length"] = torch.tensor(lengths)
        if all(example.references for example in examples):
            batch["generation"] = self._generation(examples, questions)
        return batch

    def _generation(self, examples: Sequence[Example], questions: Sequence[Encoded]) -> dict[str, Any]:
        ids, mask = left_padded([question.context for question in questions], self.pad_id)
        tasks = [self.tasks[example.task] for example in examples]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "references": [
                [extracted(text, task.extract) or "" for text in example.references]
                for example, task in zip(examples, tasks)
            ],
            "extract": [task.extract for task in tasks],
            "stop": [list(task.stop) for task in tasks],
            "max_new_tokens": [task.max_new_tokens for task in tasks],
            "normalise": [task.normalise for task in tasks],
        }


class TrainingSequences:
    """Batches to train on: input_ids, attention_mask and labels, int64 [B, T], padded to the right.

    A sequence is prompt, right answer and the end token; the labels are the tokens themselves, `IGNORED` on padding
    and, unless the task says otherwise, on the prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoded: Callable[[int], Encoded],
        tasks: dict[str, TextTask],
        pad_id: int,
        eos_id: int | None,
    ) -> None:
        self.examples, self.encoded, self.tasks, self.pad_id, self.eos_id = examples, encoded, tasks, pad_id, eos_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        sequences, masked = [], []
        for index in indices:
            example, question = self.examples[index], self.encoded(int(index))
            end = () if self.eos_id is None else (self.eos_id,)
            sequences.append(question.context + question.options[example.label] + end)
            masked.append(0 if self.tasks[example.task].train_on_prompt else len(question.context))
        width = max(map(len, sequences))
        shape = (len(sequences), width)
        ids, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, (sequence, first) in enumerate(zip(sequences, masked)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            labels[row, first : len(sequence)] = torch.tensor(sequence[first:])
            mask[row, : len(sequence)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
