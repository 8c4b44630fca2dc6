"""Every command of the pages is one that the command line takes, and says what it needs beside genlight."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from docs.pages import ROOT

from genlight import cli
from genlight.config_check import check, resolved
from genlight.sweep import jobs_of

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:srun .*)?\S*python -m genlight ((?:fit|validate) .*)$")
# what comes with genlight or its packages; all else is a file of the user or of others
_AT_HAND = ("digits", "tiny_tasks", "prompts")


def commands(page: Path) -> list[tuple[str, str]]:
    """The words of each command of a page and the comment behind it; those with an ellipsis are patterns."""
    found = []
    for line in page.read_text().replace("\\\n", " ").splitlines():
        matched = _COMMAND.match(line)
        if matched and "…" not in line:
            words, _, comment = matched[1].partition(" # ")
            found.append((re.sub(r"<[^>]*>", "folder", words).strip(), comment.strip()))
    return found


ALL = {(words, comment): page for page in PAGES for words, comment in commands(page)}


def composed(words: str) -> dict[str, Any]:
    """The config of a command, as the command line itself composes and checks it."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    OmegaConf.register_new_resolver("genlight.cache", cli.cache_folder, replace=True)
    command, *others = [word for word in shlex.split(words, comments=True) if word not in cli.MULTIRUN]
    others = list(jobs_of(others)[0].words)
    with cli._composing():
        config = compose("config", overrides=[f"command={command}", *others], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        with open_dict(job):
            plain = resolved(job)
    check(plain)
    return plain


def needs(config: dict[str, Any]) -> list[str]:
    """What has to be at hand: weights that no recipe here trains, and data that does not come with a package."""
    sources = {f"module.{key}": config["module"].get(key) for key in ("pretrained", "vae", "teacher")}
    for name, member in (config["module"].get("members") or {}).items():
        sources[f"module.members.{name}"] = member.get("source") if isinstance(member, dict) else member
    sources["ckpt_path"] = config["ckpt_path"]
    root = config["run"]["root"] + "/"
    found = [key for key, source in sources.items() if isinstance(source, str) and not source.startswith(root)]
    data = config["data"].get("images") or config["data"]
    # a path that is none says so itself
    at_hand = data["_target_"].split(".")[2] in _AT_HAND or str(data.get("root")).startswith("/path/to/")
    return found if at_hand else [*found, "data"]


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 40


# those with --config-dir are run, see test_add_a_method.py and test_add_a_model.py
@pytest.mark.parametrize(
    ("words", "comment"), [each for each in ALL if "--config-dir" not in each[0]], ids=lambda text: text[:70]
)
def test_a_command_composes_and_says_what_it_needs(words: str, comment: str) -> None:
    wanted = needs(composed(words))
    assert bool(wanted) == comment.startswith("needs "), f"{ALL[words, comment]}: {wanted}, comment {comment!r}"


# stack.md is no method, but says which go together
METHODS = sorted(page for page in (ROOT / "docs" / "methods").glob("*.md") if page.stem != "stack")


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_a_page_of_a_method_has_all_its_parts(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Try it", headings
    for wanted in ("Your own", "Limits", "When not to use it"):
        assert any(heading.startswith(wanted) for heading in headings), f"{page.stem}: no section {wanted!r}"
    assert re.search(r"!\[.+\]\(\.\./images/.+\.png\)", text) and "\n|---" in text
    shown = commands(page)
    free = [words for words, comment in shown if not comment.startswith("needs ")]
    assert free, "a command that runs without anything to download"
