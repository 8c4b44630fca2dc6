"""Facts about the embedded tasks."""

import numpy as np
import pytest

from genlight.data.digits import _read_digits
from genlight.data.tiny_tasks import MAX_LENGTH, WORDS, TinyTasksDataModule, digit_rows, sort_rows, text_rows
from genlight.data.tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def data() -> TinyTasksDataModule:
    return TinyTasksDataModule()


def test_digits_are_the_images_and_those_moved_by_a_pixel() -> None:
    rows, digits = digit_rows(), _read_digits()
    patterns = np.array([[int(word[1:]) for word in row["pixels"][1:-1].split("><")] for row in rows])
    white = (patterns[:, :, None] >> np.array([3, 2, 1, 0]) & 1).reshape(-1, 8, 8).astype(bool)
    assert len({image.tobytes() for image in white}) == len(rows) > 15000
    images = digits[:, :64].reshape(-1, 8, 8) >= 8
    plain = [row["image"] for row in rows if not row["moved"]]
    assert np.array_equal(white[: len(plain)], images[plain]) and len(plain) > 1700
    for row, image in zip(rows[len(plain) :: 97], white[len(plain) :: 97], strict=True):
        moves = (np.pad(images[row["image"]], 1)[y : y + 8, x : x + 8] for y in range(3) for x in range(3))
        assert sum(np.array_equal(image, move) for move in moves) == 1
    assert all(row["digit"] == str(digits[row["image"], 64]) for row in rows)


def test_sorting_is_right_and_texts_have_one_true_continuation() -> None:
    assert all("".join(sorted(row["letters"])) == row["sorted"] for row in sort_rows()[:200])
    rows = text_rows()
    assert len(rows) > 5000
    blocks: dict[int, str] = {}
    for row in rows:
        window = row["text"] + row["continuations"][row["right"]]
        assert len(window) == 44 and len(row["continuations"]) == 4
        if not row["overlapping"]:
            blocks[row["block"]] = blocks.get(row["block"], "") + window
    assert {len(text) for text in blocks.values()} == {440}
    assert 0.2 < np.mean([row["right"] == 0 for row in rows]) < 0.3


def test_every_draw_has_plain_questions_of_every_task(data) -> None:
    for draw in ("search", "select", "report"):
        found = data.examples(draw)
        assert [x.task for x in found[:3]] == ["digits", "text", "sort"]
        assert draw == "search" or not any(x.altered for x in found)
    images = [{x.group for x in part} for part in data.split("digits").values()]
    assert sum(map(len, images)) == len(set().union(*images)) > 1700
    assert len(data.split("digits")["search"]) > 2000


def test_everything_fits_and_every_token_is_known(data) -> None:
    tokenizer = data.tokenizer
    for name in data.task_names:
        for example in data.split(name)["report"][:50]:
            ids = tokenizer(example.prompt + example.options[example.label]).input_ids
            assert len(ids) + 1 < MAX_LENGTH
            if name != "text":
                assert tokenizer.unk_token_id not in ids
    assert {batch["input_ids"].shape[0] for batch in [next(iter(data.train_dataloader()))]} == {128}


def test_the_saved_tokenizer_is_the_same_in_plain_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer(WORDS, MAX_LENGTH)
    tokenizer.save_pretrained(tmp_path)
    text = "<digit><p0><p15>=3 <sort>QA=A~\n<unknown><"
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert again(text).input_ids == ids and len(ids) == 15
    assert again.decode(ids) == text.replace("<unknown>", "<unk>")
    assert (again.pad_token, again.eos_token, again.model_max_length) == ("<pad>", "<eos>", MAX_LENGTH)


def test_unknown_tasks_and_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.tasks names parity; there are digits, text, sort"):
        TinyTasksDataModule(tasks=["parity"])
    with pytest.raises(ValueError, match="must be letters and digits in angles"):
        character_tokenizer(["sort"])
