"""Text tasks for language models: classification, multiple choice and generation, to measure with and to train on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from genlight.data.cache import fingerprint_of
from genlight.data.evaluation_noise import check_draw
from genlight.data.loaders import FixedLoader, TrainLoader
from genlight.data.sampling import BatchOrder, Indices, even_batches
from genlight.data.seeded import SeededDataModule
from genlight.data.text_batches import Encoded, Encoder, EvaluationQuestions, TrainingSequences
from genlight.data.text_examples import SPLITS, Example, examples_of, split_examples, task_of
from genlight.data.text_sources import Row, read_hub_rows, read_rows_file
from genlight.data.tokenizer import load_tokenizer, tokenizer_digest
from genlight.errors import UserError

SHARES: Mapping[str, float] = {"train": 0.4, "search": 0.2, "select": 0.1, "report": 0.3}


def repeated(names: Sequence[str]) -> list[str]:
    """The names that come more than once, in order."""
    return [name for name, count in Counter(names).items() if count > 1]


class TextTaskDataModule(SeededDataModule):
    """Tasks of rows and templates, one or several at a time.

    A hash of a question (or of its group) puts it into one of four splits: "train" and the draws "search", "select" and
    "report", whatever else the files hold. A draw takes its questions from the tasks in turn, in an order that their
    content decides; `num_samples` takes the first. Validation batches are those of `EvaluationQuestions`: questions of
    similar length, never a part of one, choices and generated answers apart. Training batches are those of
    `TrainingSequences`, over all tasks, in an order that is a function of seed, epoch and step.

    Args:
        tasks: of each name what `TextTask` takes.
        tokenizer: folder or hub id; None: that of the module's pretrained model.
        evaluate: names of the tasks that are measured; None: all.
        shares: of the four splits; they add up to 1.
        max_length: most tokens of a question with its answer and solved examples.
        truncate: cut longer questions at their beginning, behind what the tokenizer or the chat template puts in front
            of all text; False: they are an error.
        batch_size: training sequences in a batch of one device.
        eval_batch_size: questions in a validation batch of one device.
        num_samples: questions of one evaluation; None: all of the draw.
        seed: of the training order.
        draw: "search", "select" or "report".
        chat_template: ask as in a chat, by the template that the tokenizer brings along; see `Encoder`.
        trust_remote_code: run code that the tokenizer's folder brings along.

    Raises:
        ValueError: a value out of range.
        UserError: a task is described wrongly.
    """

    name = "text_tasks"
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        tasks: Mapping[str, Any],
        tokenizer: str | None = None,
        evaluate: Sequence[str] | None = None,
        shares: Mapping[str, float] = SHARES,
        max_length: int = 2048,
        truncate: bool = False,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_samples: int | None = None,
        seed: int = 0,
        draw: str = "report",
        chat_template: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for key, value in {**sizes, "num_samples": num_samples}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key} = {value} must be at least 1")
        if seed < 0:
            raise ValueError(f"data.seed = {seed} must not be negative")
        if set(shares) != set(SPLITS) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"data.shares = {dict(shares)} must be shares of {', '.join(SPLITS)} that add up to 1")
        self.tasks = {name: task_of(name, entry) for name, entry in tasks.items()}
        self.evaluate = list(self.tasks) if evaluate is None else list(evaluate)
        if unknown := sorted(set(self.evaluate) - set(self.tasks)):
            raise ValueError(f"data.evaluate names {', '.join(unknown)}, tasks are {', '.join(self.tasks) or 'none'}")
        if twice := repeated(self.evaluate):
            raise ValueError(f"data.evaluate names {', '.join(twice)} twice: name each task once")
        self.tokenizer_source, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.chat_template, self.trust_remote_code = chat_template, trust_remote_code
        self.shares, self.batch_size, self.eval_batch_size = dict(shares), batch_size, eval_batch_size
        self.seed, self.draw = seed, check_draw(draw)
        self._limit = num_samples
        self._tokenizer: Any = None
        self._splits: dict[str, dict[str, list[Example]]] = {}
        self._drawn: dict[str, list[Example]] = {}
        self._encoded: dict[tuple[str, int], Encoded] = {}

    def read_rows(self, name: str) -> Sequence[Row]:
        """The rows of a task; UserError where they cannot be read."""
        task, key = self.tasks[name], f"data.tasks.{name}"
        if (task.path is None) == (task.dataset is None):
            raise UserError(f"{key} needs either a path or a dataset, and not both")
        if task.path is not None:
            return read_rows_file(task.path, f"{key}.path")
        return read_hub_rows(str(task.dataset), task.subset, task.split, f"{key}.dataset")

    def load_tokenizer(self) -> Any:
        """The tokenizer; UserError where there is none."""
        if self.tokenizer_source is None:
            raise UserError("data.tokenizer is null, and the module has no pretrained model to take it from")
        return load_tokenizer(self.tokenizer_source, trust_remote_code=self.trust_remote_code)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded at the first call."""
        if self._tokenizer is None:
            self._tokenizer = self.load_tokenizer()
        return self._tokenizer

    @property
    def task_names(self) -> list[str]:
        """Names of all tasks, in the order of the numbers that batches hold."""
        return list(self.tasks)

    def split(self, name: str) -> dict[str, list[Example]]:
        """The examples of a task by split, in order; read at the first call.

        Raises:
            UserError: rows that cannot be read or do not fit the task.
        """
        if name not in self._splits:
            examples = examples_of(name, self.tasks[name], self.read_rows(name))
            self._splits[name] = split_examples(examples, self.shares)
        return self._splits[name]

    def examples(self, draw: str) -> list[Example]:
        """All questions of a draw, or of "train", the tasks in turn.

        Raises:
            UserError: there are no tasks, or a task has no questions in it.
        """
        if draw not in self._drawn:
            names = list(self.tasks) if draw == "train" else self.evaluate
            if not names:
                raise UserError("data.tasks is empty: there is nothing to measure or to train on")
            for name in names:
                if not self.split(name)[draw] and draw != "train":
                    raise UserError(f"data.tasks.{name} has no questions in the draw {draw}: raise data.shares.{draw}")
            ranked = [
                (place, number, example)
                for number, name in enumerate(names)
                for place, example in enumerate(self.split(name)[draw])
            ]
            self._drawn[draw] = [example for _, _, example in sorted(ranked, key=lambda entry: entry[:2])]
        return self._drawn[draw]

    def measuring(self, names: Sequence[str]) -> TextTaskDataModule:
        """The same data with other tasks measured; tasks keep their numbers, and nothing is read twice.

        Raises:
            ValueError: an unknown task, one twice, or none.
        """
        if not names or set(names) - set(self.tasks) or repeated(names):
            raise ValueError(f"tasks = {list(names)} must be one or more of {', '.join(self.tasks)}, each once")
        other = copy.copy(self)
        other.evaluate, other._drawn, other._encoded = list(names), {}, {}
        return other

    @property
    def num_samples(self) -> int:
        """Questions of one evaluation on the present draw; it can be set."""
        count = len(self.examples(self.draw))
        return count if self._limit is None else min(self._limit, count)

    @num_samples.setter
    def num_samples(self, value: int | None) -> None:
        self._limit = value

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of all questions, their splits and the tokenizer."""
        keys = {
            name: {split: [example.key for example in found] for split, found in self.split(name).items()}
            for name in self.tasks
        }
        plain = {name: repr(task) for name, task in self.tasks.items()}
        cut = self.truncate and "behind the head"
        facts = [self.name, keys, plain, tokenizer_digest(self.tokenizer), self.max_length, cut]
        return fingerprint_of([*facts, self.tokenizer.chat_template] if self.chat_template else facts)

    def train_dataloader(self) -> TrainLoader:
        examples = self.examples("train")
        rank, world_size = self._place()
        if len(examples) < self.batch_size * world_size:
            raise UserError(
                f"{self.name}: data.batch_size = {self.batch_size} on {world_size} device(s) is more than the "
                f"{len(examples)} training sequences; see data.shares.train"
            )
        encoder = self._encoder(reserved=0 if self.tokenizer.eos_token_id is None else 1)
        dataset = TrainingSequences(
            examples,
            lambda index: self._encode(encoder, "train", index),
            self.tasks,
            encoder.pad_id,
            self.tokenizer.eos_token_id,
        )
        order = BatchOrder(len(examples), self.batch_size, self.seed, rank, world_size)
        return TrainLoader(dataset, order, 0, self.trainer)

    def val_dataloader(self) -> FixedLoader:
        draw, encoder = self.draw, self._encoder()
        examples = self.examples(draw)[: self.num_samples]
        dataset = EvaluationQuestions(
            examples, lambda index: self._encode(encoder, draw, index), self.tasks, encoder.pad_id
        )
        lengths = [dataset.encoded(index).length for index in range(len(examples))]
        batches: list[Indices] = []
        # one kind after the other: where a sharded model generates, all processes must
        for generated in (False, True):
            chosen = [index for index, example in enumerate(examples) if bool(example.references) == generated]
            if chosen:
                batches += self._batches(sorted(chosen, key=lambda index: (lengths[index], index)))
        return FixedLoader(dataset, batches)

    def _batches(self, indices: Sequence[int]) -> list[Indices]:
        """This process's share of questions ordered by length, in batches of similar length."""
        import numpy as np

        rank, world_size = self._place()
        # dealt out in turn, so that every process has short and long ones
        dealt = np.concatenate([np.asarray(indices[start::world_size], np.int64) for start in range(world_size)])
        try:
            places = even_batches(len(indices), self.eval_batch_size, rank, world_size)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return [dealt[batch] for batch in places]

    def _encoder(self, reserved: int = 0) -> Encoder:
        if self.chat_template and not self.tokenizer.chat_template:
            raise UserError("data.chat_template=true, but the tokenizer brings no template along, as chat models do")
        return Encoder(self.tokenizer, self.max_length - reserved, self.truncate, self.chat_template)

    def _encode(self, encoder: Encoder, split: str, index: int) -> Encoded:
        key = (split, index)
        if key not in self._encoded:
            example = self.examples(split)[index]
            task = self.tasks[example.task]
            measured = split != "train"
            room = task.max_new_tokens if measured and task.kind == "generation" else 0
            self._encoded[key] = encoder.encode(example, task, self._shots(example.task) if measured else "", room)
        return self._encoded[key]

    def _shots(self, name: str) -> str:
        """The solved examples in front of each question of a task; UserError if the training split has too few."""
        task = self.tasks[name]
        found = [example for example in self.split(name)["train"] if not example.altered][: task.num_shots]
        if len(found) < task.num_shots:
            raise UserError(
                f"data.tasks.{name}.num_shots = {task.num_shots}, but the training split has {len(found)} examples: "
                "raise data.shares.train"
            )
        return "".join(f"{x.prompt}{task.answer_prefix}{x.options[x.label]}{task.shot_separator}" for x in found)

    @property
    def image_shape(self) -> NoReturn:
        """UserError: there are no images."""
        raise UserError(f"data={self.name} holds no images: it is made for module=causal_lm")

    def reference_loader(self, split: str) -> NoReturn:
        """UserError: there are no real images."""
        raise UserError(f"data={self.name} holds no real images to compare with: use metrics=none")
