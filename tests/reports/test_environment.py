"""Secrets stay out of what is written; revision, versions and machine are those of this process."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight.reports import environment as env

SECRET = "s3cr3tvalue"


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "secret", "client_secret", "password", "api_key", "apiKey", "WANDB_API_KEY", "access_key"],
)
def test_secret_keys_are_masked_at_any_depth(key):
    config = {"a": [{"b": {key: SECRET}}], key: {"inner": SECRET, "list": [SECRET, 1]}}
    shown = env.masked(config)
    assert SECRET not in str(shown) and shown["a"][0]["b"][key] == "***"
    assert config["a"][0]["b"][key] == SECRET


@pytest.mark.parametrize(
    "key, value", [("num_tokens", 77), ("token_dim", 64), ("tokenizer", "clip"), ("keys", "x"), ("monitor", "step")]
)
def test_other_keys_are_shown(key, value):
    assert env.masked({key: value}) == {key: value}


def test_what_is_not_set_or_only_referred_to_is_shown():
    config = {"token": None, "api_key": "", "password": "${oc.env:PASSWORD}", "secret": "${oc.env:X,hunter2}"}
    assert env.masked(config) == config | {"secret": "***"}


def test_credentials_inside_other_texts_are_masked():
    shown = env.masked({"url": "https://me:pw123@host/x", "id": "hf_" + "a" * 30})
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
    command = env.masked_command(["python", "-m", "genlight", "fit", override, "seed=1"])
    assert SECRET not in command and command.endswith("seed=1") and "***" in command


def test_a_word_after_a_secret_option_is_masked():
    assert env.masked_command(["x", "--token", SECRET, "y"]) == "x --token '***' y"


def test_commands_without_secrets_are_unchanged():
    words = ["python", "-m", "genlight", "fit", "experiment=digits", "data={a:1,b:[2,3]}", "run.name=my run", "key=v"]
    command = env.masked_command(words)
    import shlex

    assert shlex.split(command) == words


@given(st.recursive(st.text("abc", min_size=1), lambda c: st.lists(c) | st.dictionaries(st.sampled_from("pqr"), c)))
def test_masking_keeps_everything_else(value):
    assert env.masked(value) == value
    assert env.masked({"password": {"x": value}, "y": value})["y"] == value


def test_git_state_of_a_checkout_and_of_a_copy_in_somebody_elses(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=n", "-c", "user.email=e@e"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    module = tmp_path / "genlight" / "reports" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (module.parents[1] / "__init__.py").write_text("")
    monkeypatch.setattr(env, "__file__", str(module))
    assert env.git_state() == (None, None)
    git("init")
    (tmp_path / "own.txt").write_text("")
    git("add", "own.txt")
    git("commit", "-m", "m")
    assert env.git_state() == (None, None)
    git("add", ".")
    git("commit", "-m", "m")
    revision, dirty = env.git_state()
    assert len(revision) == 40 and dirty is False
    module.write_text("changed")
    assert env.git_state() == (revision, True)


def test_versions_need_no_import():
    program = (
        "import sys; from genlight.reports.environment import environment as e; e(['x']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_environment_is_complete():
    found = env.environment(["python", "-m", "genlight", f"token={SECRET}"])
    assert found["command"] == "python -m genlight 'token=***'"
    assert found["versions"]["torch"].startswith("2.") and found["date"].endswith("+00:00")
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0.5 and found["machine"]["cpu"]
    assert str(Path.home()) not in str(found)
