"""Draws, batches and training sequences of text tasks."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genlight.data.sampling import DRAWS
from genlight.data.text_batches import IGNORED, Encoder, scoring_batch
from genlight.data.text_examples import Example, task_of
from genlight.data.text_tasks import TextTaskDataModule
from genlight.data.tokenizer import character_tokenizer, load_tokenizer
from genlight.errors import UserError

CHOICE = {"kind": "multiple_choice", "prompt": "{q}", "choices": "c", "answer": "a", "answer_prefix": ""}
WRITTEN = {"kind": "generation", "prompt": "{q}", "answer": "a", "answer_prefix": ""}


class Embedded(TextTaskDataModule):
    """Tasks whose rows are at hand, and a tokenizer of characters."""

    def __init__(self, rows, tasks, **options) -> None:
        super().__init__(tasks, **options)
        self.rows = rows

    def read_rows(self, name):
        return self.rows[name]

    def load_tokenizer(self):
        return character_tokenizer()


def data_of(choices=90, written=40, **options) -> Embedded:
    """Two tasks of questions with unequal lengths."""
    words = ["x" * (1 + n % 3) for n in range(5)]
    rows = {
        "choice": [{"q": f"q{n}" * (1 + n % 4), "c": words[: 2 + n % 4], "a": n % 2} for n in range(choices)],
        "written": [{"q": f"w{n}" + "-" * (n % 5), "a": f"{n}"} for n in range(written)],
    }
    return Embedded(rows, {"choice": CHOICE, "written": {**WRITTEN, "max_new_tokens": 4}}, **options)


def questions_of(data) -> dict[int, tuple]:
    """By number in the draw: the task, and for each option its row of tokens, without padding, and its targets."""
    found = {}
    for batch in data.val_dataloader():
        rows = [
            row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        options: dict[int, list] = {}
        for number, (question, slot) in enumerate(batch["option_place"].tolist()):
            assert slot == len(options.setdefault(question, []))
            target = batch["option_targets"][number]
            options[question].append((rows[batch["option_row"][number]], target[target != IGNORED].tolist()))
        assert sorted(options) == list(range(len(batch["index"])))
        for place, index in enumerate(batch["index"].tolist()):
            assert index not in found
            found[index] = (batch["task"][place].item(), batch["label"][place].item(), options[place])
    return found


def test_every_question_is_asked_once_whatever_the_batches_and_processes() -> None:
    whole = questions_of(data_of())
    data = data_of()
    assert sorted(whole) == list(range(len(data.examples("report"))))
    for size in (1, 3, 1000):
        assert questions_of(data_of(eval_batch_size=size)) == whole
    shared: dict = {}
    counts = set()
    for rank in range(3):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)  # type: ignore[assignment]
        batches = list(data.val_dataloader())
        # a sharded model hangs where one process generates and another does not
        counts.add(tuple("generation" in batch for batch in batches))
        part = questions_of(data)
        assert not set(part) & set(shared)
        shared |= part
    assert shared == whole and len(counts) == 1


def test_rows_and_targets_spell_prompt_and_options() -> None:
    data = data_of()
    tokenizer, examples = data.tokenizer, data.examples("report")
    for index, (task, label, options) in questions_of(data).items():
        example = examples[index]
        assert (data.task_names[task], label) == (example.task, example.label)
        for text, (row, target) in zip(example.options, options, strict=True):
            assert tokenizer.decode([*row, target[-1]]) == example.prompt + text
            assert tokenizer.decode(target) == text


def test_options_of_one_token_share_their_row() -> None:
    encoder = Encoder(character_tokenizer(), 50)
    task = task_of("t", {**CHOICE, "choices": "c"})
    questions = [encoder.encode(Example("t", "", "", q, ("a", "b", "cd"), 0), task) for q in ("one", "three")]
    batch = scoring_batch(questions, 0)
    assert batch["input_ids"].shape == (4, 6) and batch["option_row"].tolist() == [0, 0, 1, 2, 2, 3]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 5, 6]
    assert bool((batch["attention_mask"][:, -1] == 1).all())


def test_draws_are_disjoint_in_turn_and_a_prefix_of_themselves() -> None:
    data = data_of()
    prompts = {draw: [x.prompt for x in data.examples(draw)] for draw in (*DRAWS, "train")}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 130
    search = data.examples("search")
    assert [x.task for x in search[:8]] == ["choice", "written"] * 4
    data.draw, data.num_samples = "search", 5
    assert data.num_samples == 5 and sorted(questions_of(data)) == list(range(5))
    data.num_samples = 10**6
    assert data.num_samples == len(search)
    only = data_of(evaluate=["written"])
    assert {x.task for x in only.examples("report")} == {"written"}
    assert {x.task for x in only.examples("train")} == {"choice", "written"}
    # numbers of tasks do not depend on which are measured
    assert {task for task, _, _ in questions_of(only).values()} == {1}


def test_generation_batches_hold_the_prompts_and_what_ends_an_answer() -> None:
    data = data_of(evaluate=["written"], eval_batch_size=1000)
    (batch,) = data.val_dataloader()
    given, examples = batch["generation"], data.examples("report")
    for place, index in enumerate(batch["index"].tolist()):
        row, mask = given["input_ids"][place], given["attention_mask"][place]
        assert data.tokenizer.decode(row[mask.bool()]) == examples[index].prompt
        assert given["references"][place] == list(examples[index].references)
        assert (given["max_new_tokens"][place], given["stop"][place]) == (4, ["\n"])


def test_a_prefix_of_answers_is_given_and_no_part_of_them() -> None:
    rows = {"t": [{"q": f"q{n}=", "c": ["x", "yy"], "a": n % 2} for n in range(40)]}
    data = Embedded(rows, {"t": {**CHOICE, "answer_prefix": " A: "}}, eval_batch_size=1000)
    for _, _, options in questions_of(data).values():
        assert [data.tokenizer.decode(target) for _, target in options] == [" x", " yy"]
    rows = {"t": [{"q": f"q{n}=", "a": "x"} for n in range(40)]}
    data = Embedded(rows, {"t": {**WRITTEN, "answer_prefix": " A: "}}, eval_batch_size=1000)
    (batch,) = data.val_dataloader()
    given = batch["generation"]["input_ids"]
    assert all(data.tokenizer.decode(row).endswith("= A:") for row in given)


def test_solved_examples_stand_before_questions_and_come_from_training() -> None:
    rows = {"t": [{"q": f"q{n}=", "c": ["x", "yy"], "a": n % 2} for n in range(40)]}
    task = {**CHOICE, "num_shots": 2, "shot_separator": ";", "answer_prefix": " "}
    data = Embedded(rows, {"t": task}, batch_size=4)
    first, second = data.examples("train")[:2]
    shots = f"{first.prompt} {first.options[first.label]};{second.prompt} {second.options[second.label]};"
    examples = data.examples("report")
    for index, (_, _, options) in questions_of(data).items():
        row, target = options[0]
        assert data.tokenizer.decode([*row, target[-1]]) == shots + examples[index].prompt + " x"
        assert data.tokenizer.decode(target) == " x"
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] < 10  # none in training
    data = Embedded(rows, {"t": {**CHOICE, "num_shots": 30}})
    with pytest.raises(UserError, match=r"data\.tasks\.t\.num_shots = 30, but the training split has \d+ examples"):
        data.val_dataloader()


def test_training_sequences_are_prompt_answer_and_end() -> None:
    data = data_of(batch_size=8)
    seen, examples = [], data.examples("train")
    loader = data.train_dataloader()
    for step, batch in enumerate(loader):
        for row, mask, labels, index in zip(*batch.values(), loader.batch_sampler.batch(step), strict=True):
            example = examples[index]
            answer = example.options[example.label]
            length = int(mask.sum())
            assert bool(mask[:length].all())
            assert data.tokenizer.decode(row[:length]) == f"{example.prompt}{answer}<eos>"
            assert labels.eq(IGNORED).sum() == len(labels) - len(answer) - 1
            kept = labels != IGNORED
            assert torch.equal(labels[kept], row[kept])
            seen.append(int(index))
    assert len(seen) == len(set(seen)) == len(examples) // 8 * 8
    whole = Embedded(data.rows, {"written": {**WRITTEN, "train_on_prompt": True}}, batch_size=2)
    batch = next(iter(whole.train_dataloader()))
    assert torch.equal(batch["labels"] != IGNORED, batch["attention_mask"].bool())


def test_long_questions_are_refused_or_lose_their_beginning() -> None:
    rows = {"t": [{"q": f"{n:02d}" + "-" * 10 + "?", "c": ["x", "yyy"], "a": 0} for n in range(40)]}
    with pytest.raises(
        UserError, match=r"the question '\d\d-+\?' takes 16 tokens with its answer, data\.max_length = 12"
    ):
        Embedded(rows, {"t": CHOICE}, max_length=12).val_dataloader()
    for row, target in questions_of(Embedded(rows, {"t": CHOICE}, max_length=12, truncate=True))[0][2]:
        assert character_tokenizer().decode(row + target[-1:]) in ("--------?x", "--------?yyy")
    with pytest.raises(UserError, match=r"takes 16 tokens with its answer, data\.max_length = 3$"):
        Embedded(rows, {"t": CHOICE}, max_length=3, truncate=True).val_dataloader()
    written = Embedded({"t": [{"q": "abc", "a": "d"}]}, {"t": WRITTEN}, max_length=20, shares=shares(report=1))
    with pytest.raises(UserError, match=r"takes 35 tokens with its answer, data\.max_length = 20"):
        written.val_dataloader()


class Marked:
    """A tokenizer of characters that puts a token in front of all text, or asks as in a chat."""

    pad_token_id = eos_token_id = 1
    chat_template = "[user]{prompt}[me]"

    def __init__(self) -> None:
        self.plain = character_tokenizer(("<bos>",))

    def __call__(self, text, add_special_tokens=True):
        ids = self.plain(text).input_ids
        return SimpleNamespace(input_ids=[3, *ids] if add_special_tokens else ids)

    def apply_chat_template(self, turns, **_) -> str:
        return f"[user]{turns[0]['content']}[me]"


@pytest.mark.parametrize(("chat", "expected"), [(False, "<bos>56789?"), (True, "[user]9?[me]")], ids=["plain", "chat"])
def test_what_stands_in_front_of_all_text_is_not_cut(chat, expected) -> None:
    tokenizer, task = Marked(), task_of("t", CHOICE)
    room = len(tokenizer.plain(expected).input_ids)
    example = Example("t", "", "", "0123456789?", ("x", "y"), 0)
    found = Encoder(tokenizer, room + 1, truncate=True, chat=chat).encode(example, task)
    assert tokenizer.plain.decode(found.context) == expected and found.length == room + 1
    whole = Encoder(tokenizer, 40, truncate=True, chat=chat).encode(example, task)
    assert tokenizer.plain.decode(whole.context) in ("<bos>0123456789?", "[user]0123456789?[me]")
    with pytest.raises(UserError, match=r"data\.max_length = 2$"):
        Encoder(tokenizer, 2, truncate=True, chat=chat).encode(example, task)


def shares(**given: float) -> dict[str, float]:
    return {"train": 0.0, "search": 0.0, "select": 0.0, "report": 0.0, **given}


def test_tokens_that_span_prompt_and_answer_belong_to_the_answer() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["q", ":", " ", "y", "n", ": ", " y"])}
    merging = Tokenizer(models.BPE(vocabulary, [(":", " ")]))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=merging, pad_token="q"), 50)
    task = task_of("t", {**CHOICE, "answer_prefix": " "})
    found = encoder.encode(Example("t", "", "", "q:", ("y", "n"), 0), task)
    assert (found.context, found.options) == ((0,), ((5, 3), (5, 4)))


def test_a_chat_template_asks_in_a_turn_of_the_user() -> None:
    rows = {"t": [{"q": f"q{n}=", "c": ["x", "yy"], "a": n % 2} for n in range(40)]}
    data = Embedded(rows, {"t": {**CHOICE, "answer_prefix": " "}}, chat_template=True)
    with pytest.raises(UserError, match=r"data\.chat_template=true, but the tokenizer brings no template along"):
        data.val_dataloader()
    data.tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}{{ '[me]' if add_generation_prompt }}"
    )
    examples = data.examples("report")
    for index, (_, _, options) in questions_of(data).items():
        row, target = options[1]
        assert data.tokenizer.decode([*row, target[-1]]) == f"[user]{examples[index].prompt}[me]yy"
    assert data.fingerprint != Embedded(rows, {"t": {**CHOICE, "answer_prefix": " "}}).fingerprint


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=2, max_size=4), st.text("ab ", min_size=1, max_size=6))
def test_context_and_option_together_are_the_whole_text(options, prompt) -> None:
    tokenizer = character_tokenizer()
    found = Encoder(tokenizer, 50).encode(Example("t", "", "", prompt, tuple(options), 0), task_of("t", CHOICE))
    assert [tokenizer.decode(found.context + option) for option in found.options] == [prompt + o for o in options]


def test_files_and_tokenizer_folders_are_read(tmp_path) -> None:
    character_tokenizer(["<a>"]).save_pretrained(tmp_path / "tokenizer")
    rows = [{"q": f"<a>{n}", "c": ["x", "y"], "a": 1} for n in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = TextTaskDataModule({"t": {**CHOICE, "path": str(tmp_path / "x.jsonl")}}, str(tmp_path / "tokenizer"))
    assert len(questions_of(data)) == data.num_samples
    with pytest.raises(UserError, match=r"data\.tokenizer=\S+: no tokenizer can be read there"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.tokenizer=\S+: no tokenizer can be read there"):
        load_tokenizer(str(tmp_path / "tokenizer"))


def test_the_fingerprint_is_that_of_questions_splits_and_tokens() -> None:
    same = data_of().fingerprint
    assert data_of(eval_batch_size=3, seed=7, num_samples=2).fingerprint == same
    assert data_of(choices=91).fingerprint != same
    assert data_of(shares={"train": 0.3, "search": 0.2, "select": 0.1, "report": 0.4}).fingerprint != same
    data = data_of()
    data.load_state_dict(data_of().state_dict())
    with pytest.raises(UserError, match="the checkpoint was trained on other data"):
        data.load_state_dict(data_of(written=41).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, r"data\.eval_batch_size = 0 must be at least 1"),
        ({"num_samples": 0}, r"data\.num_samples = 0 must be at least 1"),
        ({"seed": -1}, r"data\.seed = -1 must not be negative"),
        ({"draw": "test"}, r"data\.draw='test' is not one of"),
        ({"evaluate": ["other"]}, r"data\.evaluate names other, tasks are choice, written"),
        ({"evaluate": ["choice", "written", "choice"]}, r"data\.evaluate names choice twice: name each task once"),
        ({"shares": {"train": 1.0}}, r"data\.shares = .* must be shares of train, search, select, report"),
        ({"shares": shares(train=0.5, report=0.4)}, "that add up to 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(**options)


def test_a_task_is_measured_once() -> None:
    assert data_of().measuring(["written"]).evaluate == ["written"]
    with pytest.raises(ValueError, match=r"tasks = \['written', 'written'\] must be one or more of .*, each once"):
        data_of().measuring(["written", "written"])


_TOKENIZER = """
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_size = 26

    def get_vocab(self):
        return {chr(97 + n): n for n in range(26)}

    def _tokenize(self, text):
        return [letter for letter in text if letter in self.get_vocab()]

    def _convert_token_to_id(self, token):
        return ord(token) - 97

    def _convert_id_to_token(self, number):
        return chr(97 + number)
"""


def test_code_of_a_tokenizer_runs_where_the_user_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    config = {"tokenizer_class": "Letters", "auto_map": {"AutoTokenizer": ["letters_of_mine.Letters", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "letters_of_mine.py").write_text(_TOKENIZER)
    with pytest.raises(UserError, match=r"brings code of its own, which data\.trust_remote_code=true runs"):
        TextTaskDataModule({}, str(folder)).tokenizer  # noqa: B018
    assert TextTaskDataModule({}, str(folder), trust_remote_code=True).tokenizer("cab").input_ids == [2, 0, 1]


def test_what_is_missing_is_named() -> None:
    empty = TextTaskDataModule({})
    with pytest.raises(UserError, match=r"data\.tasks is empty"):
        empty.examples("report")
    with pytest.raises(UserError, match=r"data\.tokenizer is null"):
        empty.tokenizer  # noqa: B018
    with pytest.raises(UserError, match="needs either a path or a dataset, and not both"):
        TextTaskDataModule({"t": CHOICE}).examples("report")
    with pytest.raises(UserError, match=r"data\.tasks\.choice has no questions in the draw search: raise data\.shares"):
        data_of(shares=shares(report=1)).examples("search")
    with pytest.raises(
        UserError, match=r"data\.batch_size = 16 on 1 device\(s\) is more than the 0 training sequences"
    ):
        data_of(shares=shares(report=1)).train_dataloader()
    with pytest.raises(UserError, match="cannot be shared among 90 devices"):
        data = data_of()
        data.trainer = SimpleNamespace(global_rank=0, world_size=90)  # type: ignore[assignment]
        data.val_dataloader()
