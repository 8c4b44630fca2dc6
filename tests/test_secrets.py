"""Credentials are masked wherever they stand; what only looks like one stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight import secrets

SECRET = "s3cr3tvalue"


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "secret", "client_secret", "password", "api_key", "apiKey", "WANDB_API_KEY", "access_key"],
)
def test_secret_keys_are_masked_at_any_depth(key):
    config = {"a": [{"b": {key: SECRET}}], key: {"inner": SECRET, "list": [SECRET, 1]}}
    shown = secrets.masked(config)
    assert SECRET not in str(shown) and shown["a"][0]["b"][key] == "***"
    assert config["a"][0]["b"][key] == SECRET


@pytest.mark.parametrize(
    "key, value", [("num_tokens", 77), ("token_dim", 64), ("tokenizer", "clip"), ("keys", "x"), ("monitor", "step")]
)
def test_other_keys_are_shown(key, value):
    assert secrets.masked({key: value}) == {key: value}


def test_what_is_not_set_or_only_referred_to_is_shown():
    config = {"token": None, "api_key": "", "password": "${oc.env:PASSWORD}", "secret": "${oc.env:X,hunter2}"}
    assert secrets.masked(config) == config | {"secret": "***"}


def test_credentials_inside_other_texts_are_masked():
    shown = secrets.masked({"url": "https://me:pw123@host/x", "id": "hf_" + "a" * 30})
    assert shown == {"url": "https://***@host/x", "id": "***"}


@pytest.mark.parametrize(
    "override",
    [
        f"logger.api_key={SECRET}",
        f"+logger.api_key={SECRET}",
        f"++a.b.password={SECRET},{SECRET}",
        f"logger={{api_key:{SECRET},project:x}}",
        f"logger={{a:{{token: '{SECRET}'}}}}",
        f'logger={{"password": "{SECRET}"}}',
        f"--api-key={SECRET}",
        f"logger={{api_keys:[{SECRET},{SECRET}],password:a {SECRET}}}",
        f"data.url=https://user:{SECRET}@host",
    ],
)
def test_overrides_are_masked(override):
    command = secrets.masked_command(["python", "-m", "genlight", "fit", override, "seed=1"])
    assert SECRET not in command and command.endswith("seed=1") and "***" in command


def test_a_word_after_a_secret_option_is_masked():
    assert secrets.masked_command(["x", "--token", SECRET, "y"]) == "x --token '***' y"


def test_commands_without_secrets_are_unchanged():
    words = ["python", "-m", "genlight", "fit", "experiment=digits", "data={a:1,b:[2,3]}", "run.name=my run", "key=v"]
    command = secrets.masked_command(words)
    import shlex

    assert shlex.split(command) == words


@given(st.recursive(st.text("abc", min_size=1), lambda c: st.lists(c) | st.dictionaries(st.sampled_from("pqr"), c)))
def test_masking_keeps_everything_else(value):
    assert secrets.masked(value) == value
    assert secrets.masked({"password": {"x": value}, "y": value})["y"] == value


def test_special_words_of_tokenizers_are_no_secrets():
    config = {"max_tokens": 5, "tokenizer": "x", "pad_token": "<pad>", "num_tokens": 3, "token": None, "monkey": 1}
    assert secrets.masked(config) == config
