"""Tokenizers of transformers, from a folder or the hub, or made of characters."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from typing import Any

from genlight.errors import UserError

UNKNOWN, PADDING, END = "<unk>", "<pad>", "<eos>"


def load_tokenizer(source: str, key: str = "data.tokenizer", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id.

    Args:
        key: of the config that names it, for messages.
        trust_remote_code: run code that the folder brings along.

    Raises:
        UserError: there is none, it is damaged, or the hub is out of reach.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers, huggingface_hub and httpx each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason = "it brings code of its own, which data.trust_remote_code=true runs"
        raise UserError(f"{key}={source}: no tokenizer can be read there: {reason}") from error


def character_tokenizer(words: Sequence[str] = (), model_max_length: int = 1024) -> Any:
    """A `PreTrainedTokenizerFast` of one token for each printable ASCII character and for each of some words in angles.

    Args:
        words: such as "<sort>"; they are found wherever they stand.
        model_max_length: most tokens of a text, which the saved tokenizer says too.

    Raises:
        ValueError: a word is not in angles.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for word in words:
        if not (word.startswith("<") and word.endswith(">") and word[1:-1].isalnum()):
            raise ValueError(f"words: {word!r} must be letters and digits in angles, such as <sort>")
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {token: number for number, token in enumerate([PADDING, END, UNKNOWN, *words, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[A-Za-z0-9]+>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of what turns text to tokens: the whole of a fast tokenizer, the vocabulary of another."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    return hashlib.sha256(text.encode()).hexdigest()
