"""Rows to questions, and questions to splits."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight.data.text_examples import (
    SPLITS,
    Example,
    TextTask,
    examples_of,
    label_of,
    render,
    split_examples,
    split_of,
    task_of,
)
from genlight.errors import UserError

BOOLQ = {"kind": "classification", "prompt": "{passage}\n{question}?", "choices": ["no", "yes"], "answer": "label"}
SHARES = {"train": 0.4, "search": 0.2, "select": 0.1, "report": 0.3}
shares_of = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def examples(entry, rows):
    return examples_of("t", task_of("t", entry), rows)


def test_a_row_becomes_a_question() -> None:
    row = {"passage": "Cats sleep.", "question": "do they", "label": True}
    (found,) = examples(BOOLQ, [row])
    assert (found.prompt, found.options, found.label) == ("Cats sleep.\ndo they?", ("no", "yes"), 1)
    assert found.group == found.prompt and found.references == ()
    nested = {"q": "?", "c": {"text": ["a", "b", "c"]}, "key": "B"}
    entry = {"kind": "multiple_choice", "prompt": "{q}", "choices": "c.text", "answer": "key"}
    assert [(x.options, x.label) for x in examples(entry, [nested])] == [(("a", "b", "c"), 1)]
    entry = {**entry, "choices": ["<{a}>", "{b}{{}}"], "answer": "n"}
    assert examples(entry, [{"q": "?", "a": 1, "b": "x", "n": 0}])[0].options == ("<1>", "x{}")
    entry = {"kind": "generation", "prompt": "{q}", "answer": "answers.text"}
    (found,) = examples(entry, [{"q": "?", "answers": {"text": ["one", "1"]}}])
    assert (found.options, found.label, found.references) == (("one",), 0, ("one", "1"))


@pytest.mark.parametrize(
    ("value", "number"), [(2, 2), ("2", 2), ("C", 2), ("yes", 1), (" yes ", 1), (True, 1), ("B", 1)]
)
def test_answers_are_texts_numbers_or_letters(value, number) -> None:
    assert label_of(value, ("no", " yes", "maybe"), "here") == number


def test_choices_that_have_names_of_their_own() -> None:
    """ARC counts some of its questions from 1, and WinoGrande does all."""
    entry = {"kind": "multiple_choice", "prompt": "{q}", "choices": "c.text", "answer": "k", "answer_labels": "c.label"}
    rows = [{"q": "a", "c": {"text": list("xyz"), "label": list(names)}, "k": names[2]} for names in ("ABC", "123")]
    assert [example.label for example in examples(entry, rows)] == [2, 2]
    entry = {**entry, "choices": ["{a}", "{b}"], "answer_labels": [1, 2]}
    assert examples(entry, [{"q": "_", "a": "x", "b": "y", "k": "2"}])[0].label == 1
    for change, row, message in (
        ({}, {"k": "3"}, "the answer '3' is none of the answer_labels 1, 2"),
        ({"answer_labels": "k"}, {"k": "1"}, "answer_labels must be 2 different names of the choices, got '1'"),
        ({"answer_labels": [1]}, {"k": 1}, "answer_labels must be 2 different names"),
    ):
        with pytest.raises(UserError, match=message):
            examples({**entry, **change}, [{"q": "_", "a": "x", "b": "y", **row}])


def test_a_question_without_an_answer_has_the_one_that_says_so() -> None:
    entry = {"kind": "generation", "prompt": "{q}", "answer": "answers.text", "unanswerable": "unanswerable"}
    rows = [{"q": "a", "answers": {"text": []}}, {"q": "b", "answers": {"text": ["x", "y"]}}]
    assert [example.references for example in examples(entry, rows)] == [("unanswerable",), ("x", "y")]


def test_a_text_among_the_choices_is_no_number() -> None:
    assert label_of("1", ("3", "2", "1"), "here") == 2
    assert label_of(1, ("0", "1", "2"), "here") == 1 and label_of(24, ("8", "2", "24", "120"), "here") == 2
    with pytest.raises(UserError, match=r"here: the answer 2 is the text of one choice and the number of another"):
        label_of(2, ("8", "2", "24", "120"), "here")


@pytest.mark.parametrize("options", [("True", "False"), ("yes", "no"), ("TRUE", "FALSE", "unknown")])
def test_a_truth_value_is_the_choice_that_says_so(options) -> None:
    assert (label_of(True, options, "here"), label_of(False, options, "here")) == (0, 1)


@pytest.mark.parametrize("value", [3, -1, "3", "D", "b", "", "perhaps", 0.5, None])
def test_other_answers_are_refused(value) -> None:
    with pytest.raises(UserError, match=r"here: the answer .* is none of the choices 'no', 'yes', 'maybe'"):
        label_of(value, ("no", " yes", "maybe"), "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"passage": "", "question": "a", "label": 0}, r"data\.tasks\.t, row 1: the field passage is empty"),
        ({"passage": " \n", "question": "a", "label": 0}, "the field passage is empty"),
        ({"passage": None, "question": "a", "label": 0}, "the field passage is empty"),
        ({"passage": ["x"], "question": "a", "label": 0}, "the field passage is no text"),
        ({"passage": "p", "label": 0}, r"there is no field question; fields: passage, label"),
        ({"passage": "p", "question": "a"}, r"there is no field label; fields: passage, question"),
        ({"passage": "p", "question": "a", "label": None}, "the answer None is none of the choices"),
    ],
)
def test_faults_of_a_row_are_named(row, message) -> None:
    with pytest.raises(UserError, match=message):
        examples(BOOLQ, [row])


def test_empty_answers_and_short_lists_are_named() -> None:
    generation = {"kind": "generation", "prompt": "{q}", "answer": "a"}
    for value, message in ((" ", "the answer in a is empty"), ([], "the field a holds no answer")):
        with pytest.raises(UserError, match=message):
            examples(generation, [{"q": "?", "a": value}])
    number = {**generation, "extract": r"####\s*(\S+)"}
    with pytest.raises(UserError, match=r"row 2: nothing in the answer 'two' matches extract"):
        examples(number, [{"q": "?", "a": "1 + 1\n#### 2"}, {"q": "!", "a": "two"}])
    choice = {"kind": "multiple_choice", "prompt": "{q}", "choices": "c", "answer": "a"}
    with pytest.raises(UserError, match="holds no list of two or more choices: 'xy'"):
        examples(choice, [{"q": "?", "a": 0, "c": "xy"}])
    with pytest.raises(UserError, match="choice 1 in c is empty"):
        examples(choice, [{"q": "?", "a": 0, "c": ["x", ""]}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, r"data\.tasks\.t\.kind: Input should be 'classification'"),
        ({"promt": "x"}, r"data\.tasks\.t\.promt: Unexpected keyword argument \(known: kind, prompt, answer"),
        ({"choices": None}, r"data\.tasks\.t: choices must be two or more different texts, got None"),
        ({"choices": ["a", "a"]}, "choices must be two or more different texts"),
        ({"choices": ["a", " "]}, "choices must be two or more different texts"),
        ({"kind": "generation"}, "choices must be null for kind=generation"),
        ({"kind": "multiple_choice", "choices": None}, "choices must be the name of a field with a list"),
        ({"extract": "x"}, "extract is for kind=generation alone"),
        ({"unanswerable": "x"}, "unanswerable is for kind=generation"),
        ({"kind": "generation", "choices": None, "answer_labels": "x"}, "answer_labels are for choices"),
        ({"kind": "generation", "choices": None, "extract": "("}, r"extract = '\(' is no regular expression"),
        ({"num_shots": -1}, "num_shots must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens at least 1"),
        ({"prompt": "{question.__class__!r}"}, "braces hold the name of a field and nothing else"),
        ({"prompt": "{}"}, "braces hold the name of a field and nothing else"),
        ({"prompt": "{question"}, "expected '}' before end of string"),
    ],
)
def test_tasks_that_cannot_be_are_refused(change, message) -> None:
    with pytest.raises(UserError, match=message):
        task_of("t", {**BOOLQ, **change})
    with pytest.raises(UserError, match="a name is made of letters"):
        task_of("a/b", BOOLQ)


@given(st.dictionaries(st.text("abc", min_size=1), st.text("xyz{} ", min_size=1).filter(str.strip), min_size=1))
def test_templates_put_values_in_as_they_are(row) -> None:
    template = "|".join(f"{{{name}}}" for name in row)
    assert render(template, row, "here") == "|".join(row.values())


@given(st.lists(st.text(), unique=True, max_size=30), shares_of)
def test_the_split_of_a_group_depends_on_nothing_else(groups, counts) -> None:
    shares = {name: count / sum(counts) for name, count in zip(SPLITS, counts, strict=True)}
    found = [Example("t", group, group, group, ("a", "b"), 0) for group in groups]
    splits = split_examples(found, shares)
    assert sorted(x.group for part in splits.values() for x in part) == sorted(groups)
    assert splits == split_examples(found[::-1], shares)
    for name, part in splits.items():
        assert all(split_of(x.group, shares) == name for x in part)
        assert shares[name] > 0 or not part


def test_splits_are_stable_and_as_large_as_their_shares() -> None:
    # written down once: a change would let questions of old searches into new reports
    assert [split_of(f"question {n}", SHARES) for n in range(8)] == [
        "train",
        "train",
        "report",
        "report",
        "search",
        "search",
        "report",
        "report",
    ]
    counts = dict.fromkeys(SPLITS, 0)
    for number in range(4000):
        counts[split_of(f"question {number}", SHARES)] += 1
    assert all(abs(counts[name] / 4000 - share) < 0.03 for name, share in SHARES.items())


def test_groups_stay_together_and_copies_stay_out_of_reports() -> None:
    entry = {"kind": "generation", "prompt": "{q}", "answer": "a", "group": "g", "altered": "copy"}
    rows = [{"q": f"{g}/{n}", "a": "x", "g": g, "copy": n > 0} for g in range(200) for n in range(3)]
    splits = split_examples(examples(entry, rows), SHARES)
    groups = {name: {x.group for x in part} for name, part in splits.items()}
    assert sum(map(len, groups.values())) == 200
    assert all(len(splits[name]) == len(groups[name]) for name in ("select", "report"))
    assert all(len(splits[name]) == 3 * len(groups[name]) for name in ("train", "search"))
    assert [(x.altered, x.key) for x in splits["search"]] == sorted((x.altered, x.key) for x in splits["search"])
    assert not any(x.altered for x in splits["search"][: len(groups["search"])])
    written = [{**row, "copy": str(row["copy"])} for row in rows]  # as a .csv file has it
    assert split_examples(examples(entry, written), SHARES) == splits


def test_one_question_in_two_groups_is_refused() -> None:
    entry = {**BOOLQ, "group": "id"}
    rows = [{"passage": "p", "question": "q", "label": 0, "id": n} for n in range(20)]
    with pytest.raises(UserError, match=r"data\.tasks\.t: the question 'p\\nq\?' is both in \w+ and in \w+"):
        split_examples(examples(entry, rows), SHARES)
    assert dataclasses.replace(task_of("t", entry), group=None) == TextTask(**{**BOOLQ, "choices": ("no", "yes")})
