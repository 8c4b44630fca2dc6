"""Credentials in configs and command lines, masked before anything is written or sent."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
# names that tokenizers have for special words
_TEXT_TOKENS = {"pad", "eos", "bos", "unk", "mask", "cls", "sep"}
# texts that look like credentials whatever they are called, and the user part of a URL
_SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_\-]{12,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# name: or name= inside a text such as {api_key:abc,project:x}, and what can stand after it
_INNER_KEY = re.compile(r"""([A-Za-z_][\w.\-]*)["']?\s*[:=]\s*""")
_INNER_VALUE = re.compile(r"""\[[^\]]*\]?|\{[^}]*\}?|"[^"]*"?|'[^']*'?|[^,}\]]+""")


def is_secret(key: str, value: Any = "") -> bool:
    """Whether a config key names a credential: token, secret, password, api_key, any *_key; the last two if it is text.

    A token may also be a number of a network (token_dim: 64): only texts count there.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()) if word]
    if any(word in _SECRET_WORDS for word in words):
        return True
    if words[-1:] == ["token"] and words[-2:-1] and words[-2] in _TEXT_TOKENS:
        return False
    is_key = len(words) > 1 and words[-1] in ("key", "keys")
    return ("token" in words or "authorization" in words or is_key) and not isinstance(value, bool | int | float)


def masked(config: Any) -> Any:
    """A copy of nested dicts and lists with the value of every secret key replaced, and credentials in texts too."""
    if isinstance(config, Mapping):
        return {key: _hidden(value) if is_secret(str(key), value) else masked(value) for key, value in config.items()}
    if isinstance(config, str):
        return _masked_text(config)
    if isinstance(config, Sequence):
        return [masked(value) for value in config]
    return config


def masked_override(override: str) -> str:
    """A command-line override (``logger.api_key=abc``, ``+a={token:x}``) without its secrets."""
    key, equals, value = override.partition("=")
    if equals and value and is_secret(key.lstrip("+~-").rsplit(".", 1)[-1]):
        return f"{key}={MASK}"
    return _masked_text(f"{key}{equals}{_without_inner_secrets(value)}")


def masked_command(arguments: Sequence[str]) -> str:
    """The command as one line that a shell accepts, without its secrets."""
    result: list[str] = []
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        follows_secret = before.startswith("--") and "=" not in before and is_secret(before.lstrip("-"))
        result.append(MASK if follows_secret else masked_override(argument))
    return shlex.join(result)


def _hidden(value: Any) -> Any:
    """Masks every leaf below a secret key; what is not set shows nothing and stays."""
    if isinstance(value, Mapping):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_hidden(inner) for inner in value]
    # ${oc.env:NAME} says where a secret comes from, not what it is
    is_reference = isinstance(value, str) and re.fullmatch(r"\$\{oc\.env:\w+(,null)?\}", value)
    return value if value is None or value == "" or is_reference else MASK


def _without_inner_secrets(text: str) -> str:
    """Masks the values of secret keys in Hydra's form of dicts, at any depth."""
    shown, position = "", 0
    for key in _INNER_KEY.finditer(text):
        value = _INNER_VALUE.match(text, key.end())
        if key.start() >= position and value and is_secret(key[1].rsplit(".", 1)[-1]):
            shown += text[position : key.end()] + MASK
            position = value.end()
    return shown + text[position:]


def _masked_text(text: str) -> str:
    return _SECRET_TEXT.sub(MASK, _URL_LOGIN.sub(MASK, text))
