"""Questions with their right answers, made of rows by templates, and shared out to splits by a hash."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from genlight.data.sampling import DRAWS
from genlight.data.text_sources import Row
from genlight.errors import UserError
from genlight.metrics.text_tasks import extracted

SPLITS = ("train", *DRAWS)
TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class TextTask:
    """How the rows of a data set become questions. Fields are named by name, nested ones with dots ("answers.text").

    Attributes:
        kind: "classification": the answer is one of the same texts for all rows; "multiple_choice": one of texts that
            the row brings; both are decided by log-likelihood. "generation": the answer is written freely.
        prompt: template of the question, with the names of fields in braces.
        answer: field of the right answer. Of a choice: its number from 0, its text, or its letter (A is the first). Of
            a generation: the text, or a list of texts of which each is right.
        answer_labels: what choices are called in the field of the answer, in their order: a list, or the field with one
            (ARC: "choices.label"; WinoGrande: ["1", "2"]). None: as ``answer`` says.
        unanswerable: right answer of a generation whose row holds none (SQuAD 2).
        choices: for "classification" the texts; for "multiple_choice" the field with a list of texts, or one template
            for each text.
        answer_prefix: what stands between prompt and answer.
        path: .jsonl or .csv file.
        dataset, subset, split: of a data set of the hub, instead of a file.
        group: field; rows that are equal in it stay in one split. None: rows with equal prompts do.
        altered: field that is true in rows which are altered copies of others (augmentation). They train and search,
            and are left out of selection and report.
        num_shots: solved examples of the training split in front of each question that is measured.
        shot_separator: what stands between them.
        max_new_tokens: most tokens of a generated answer.
        stop: texts that end a generated answer.
        extract: regular expression; its last match (its first group, if it has one) is what is compared of a generated
            answer and of the right ones, such as the number at the end of a calculation. None: all of them.
        normalise: an answer matches without regard to case, punctuation and articles, as in SQuAD; False: exactly.
        train_on_prompt: learn the prompt too, not the answer alone.
    """

    kind: Literal["classification", "multiple_choice", "generation"]
    prompt: str
    answer: str
    choices: str | tuple[str, ...] | None = None
    answer_labels: str | tuple[str | int, ...] | None = None
    unanswerable: str | None = None
    answer_prefix: str = " "
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    group: str | None = None
    altered: str | None = None
    num_shots: int = 0
    shot_separator: str = "\n\n"
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    extract: str | None = None
    normalise: bool = True
    train_on_prompt: bool = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _fields_of(self.prompt)
        if self.kind == "generation" and self.choices is not None:
            raise ValueError("choices must be null for kind=generation")
        if self.kind == "classification":
            texts = self.choices if isinstance(self.choices, tuple) else ()
            if len(texts) < 2 or len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
                raise ValueError(f"choices must be two or more different texts, got {self.choices!r}")
        if self.kind == "multiple_choice" and not self.choices:
            raise ValueError("choices must be the name of a field with a list, or one template for each choice")
        if (self.answer_labels if self.kind == "generation" else self.unanswerable) is not None:
            raise ValueError("answer_labels are for choices, and unanswerable is for kind=generation")
        if self.extract is not None:
            _check_pattern(self.extract, self.kind)
        if self.num_shots < 0 or self.max_new_tokens < 1:
            raise ValueError("num_shots must not be negative, and max_new_tokens at least 1")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        task: name of its task.
        key: SHA-256 (hex) of its content, which decides its place in a split.
        group: what decides its split.
        prompt: without solved examples.
        options: answers to choose from; of a generation the first right one.
        label: number of the right option.
        references: right answers of a generation; empty where options decide.
        altered: a copy of another example with changes.
    """

    task: str
    key: str
    group: str
    prompt: str
    options: tuple[str, ...]
    label: int
    references: tuple[str, ...] = ()
    altered: bool = False


_ADAPTER = TypeAdapter(TextTask)


def task_of(name: str, entry: Any) -> TextTask:
    """The task that a section ``data.tasks.<name>`` of the config describes.

    Raises:
        UserError: an unknown key, a missing one or a wrong value, named.
    """
    if not TASK_NAME.fullmatch(name):
        raise UserError(f"data.tasks.{name}: a name is made of letters, digits, '_' and '-'")
    try:
        return _ADAPTER.validate_python(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["data.tasks", name, *(str(part) for part in first["loc"])])
        known = f" (known: {', '.join(_known_keys())})" if first["type"] == "unexpected_keyword_argument" else ""
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}{known}") from error


def _known_keys() -> list[str]:
    return [name for name in TextTask.__dataclass_fields__ if not name.startswith("_")]


def examples_of(name: str, task: TextTask, rows: Iterable[Row]) -> list[Example]:
    """The questions of a task, in the order of the rows.

    Raises:
        UserError: a field that a row lacks, an empty one, or an answer that is none of the choices, with the row.
    """
    return [_example(name, task, row, f"data.tasks.{name}, row {number}") for number, row in enumerate(rows, 1)]


def _example(name: str, task: TextTask, row: Row, where: str) -> Example:
    prompt = render(task.prompt, row, where)
    value = field_of(row, task.answer, where)
    references: tuple[str, ...] = ()
    if task.kind == "generation":
        given = value if isinstance(value, list | tuple) else [value]
        if task.unanswerable is not None and all(item in (None, "") for item in given):
            given = [task.unanswerable]
        references = tuple(_text_of(item, f"{where}: the answer in {task.answer}") for item in given)
        if not references:
            raise UserError(f"{where}: the field {task.answer} holds no answer")
        missing = [text for text in references if task.extract is not None and extracted(text, task.extract) is None]
        if missing:
            raise UserError(f"{where}: nothing in the answer {missing[0][:60]!r} matches extract = {task.extract!r}")
        options, label = references[:1], 0
    else:
        options = _options(task, row, where)
        named = task.answer_labels is not None
        label = _named(task, row, value, options, where) if named else label_of(value, options, where)
    group = prompt if task.group is None else str(field_of(row, task.group, where))
    key = hashlib.sha256("\x1f".join([prompt, *options, str(label)]).encode()).hexdigest()
    # a .csv file has texts only
    altered = task.altered is not None and str(field_of(row, task.altered, where)).lower() not in ("", "0", "false")
    return Example(name, key, group, prompt, options, label, references, altered)


def _options(task: TextTask, row: Row, where: str) -> tuple[str, ...]:
    if task.kind == "classification" and isinstance(task.choices, tuple):
        return task.choices
    if isinstance(task.choices, tuple):
        return tuple(render(template, row, where) for template in task.choices)
    found = field_of(row, str(task.choices), where)
    if not isinstance(found, list | tuple) or len(found) < 2:
        raise UserError(f"{where}: the field {task.choices} holds no list of two or more choices: {found!r}")
    return tuple(_text_of(item, f"{where}: choice {number} in {task.choices}") for number, item in enumerate(found))


def label_of(value: Any, options: Sequence[str], where: str) -> int:
    """Number of the right option: given by its text, by its number from 0, or by its letter.

    A truth value is the option "true" or "yes" ("false" or "no") in any case, else the number 1 (0).

    Raises:
        UserError: it is none of them, or a number that is also the text of another option.
    """
    stripped = [option.strip() for option in options]
    if isinstance(value, bool):
        lowered = [option.lower() for option in stripped]
        named = [name for name in (("true", "yes") if value else ("false", "no")) if name in lowered]
        return lowered.index(named[0]) if named else int(value)
    text = str(value).strip()
    if text in stripped:
        found = stripped.index(text)
        if isinstance(value, int) and found != value and 0 <= value < len(options):
            raise UserError(
                f"{where}: the answer {value} is the text of one choice and the number of another, of "
                f"{', '.join(map(repr, stripped))}: set answer_labels to {list(range(len(options)))} or to the choices"
            )
        return found
    number = int(text) if text.isdecimal() else ord(text) - ord("A") if re.fullmatch("[A-Z]", text) else -1
    if not 0 <= number < len(options):
        raise UserError(f"{where}: the answer {value!r} is none of the choices {', '.join(map(repr, stripped))}")
    return number


def _named(task: TextTask, row: Row, value: Any, options: Sequence[str], where: str) -> int:
    """Number of the right option, which is given by what the options are called."""
    labels = task.answer_labels
    found = labels if isinstance(labels, tuple) else field_of(row, str(labels), where)
    names = [str(name).strip() for name in found] if isinstance(found, list | tuple) else []
    if len(set(names)) != len(options) or len(names) != len(options):
        raise UserError(f"{where}: answer_labels must be {len(options)} different names of the choices, got {found!r}")
    if str(value).strip() not in names:
        raise UserError(f"{where}: the answer {value!r} is none of the answer_labels {', '.join(names)}")
    return names.index(str(value).strip())


def field_of(row: Row, name: str, where: str) -> Any:
    """The value of a field, with dots for nested ones; UserError naming the fields that there are."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "none"
            raise UserError(f"{where}: there is no field {name}; fields: {known}")
        value = value[part]
    return value


def render(template: str, row: Row, where: str) -> str:
    """The template with the values of the row's fields; UserError for a field that is missing or empty."""
    parts = []
    for literal, name in _fields_of(template):
        parts.append(literal)
        if name is not None:
            parts.append(_text_of(field_of(row, name, where), f"{where}: the field {name}"))
    text = "".join(parts)
    if not text.strip():
        raise UserError(f"{where}: the template {template!r} gives an empty text")
    return text


def _fields_of(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the field after it; ValueError for braces that do not hold the name of a field."""
    found = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if name is not None and (not re.fullmatch(r"\w[\w .-]*", name) or spec or conversion):
            raise ValueError(f"{template!r}: braces hold the name of a field and nothing else; {{{{ stands for a brace")
        found.append((literal, name))
    return found


def _check_pattern(pattern: str, kind: str) -> None:
    if kind != "generation":
        raise ValueError("extract is for kind=generation alone")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"extract = {pattern!r} is no regular expression: {error}") from error


def _text_of(value: Any, what: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is {'empty' if value in (None, '') or isinstance(value, str) else 'no text'}")
    return value


def split_of(group: str, shares: Mapping[str, float]) -> str:
    """The split of a group: a function of its text and the shares alone, whatever else the data set holds."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64
    stop = 0.0
    for name in SPLITS:
        stop += shares[name]
        if place < stop:
            return name
    return next(name for name in reversed(SPLITS) if shares[name] > 0)  # a sum that rounds to less than 1


def split_examples(examples: Sequence[Example], shares: Mapping[str, float]) -> dict[str, list[Example]]:
    """The examples of one task by split, each in an order that the content of the examples decides, copies last.

    So the first of a split are alike in all of them: a search asks altered copies only where the others do not suffice.

    Raises:
        UserError: the same question in two splits, because rows of different groups are equal.
    """
    result: dict[str, list[Example]] = {name: [] for name in SPLITS}
    seen: dict[tuple[str, tuple[str, ...]], str] = {}
    for example in examples:
        split = split_of(example.group, shares)
        first = seen.setdefault((example.prompt, example.options), split)
        if first != split:
            raise UserError(
                f"data.tasks.{example.task}: the question {example.prompt[:60]!r} is both in {first} and in {split}: "
                "its rows belong to different groups"
            )
        if not (example.altered and split in ("select", "report")):
            result[split].append(example)
    return {name: sorted(found, key=lambda one: (one.altered, one.key)) for name, found in result.items()}
