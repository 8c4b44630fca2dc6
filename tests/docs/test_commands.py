"""Every command of the pages is one that the command line takes, and says what it needs beside genlight or how long it
takes, unless a test runs it."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, the_error
from docs.pages import PAGES, ROOT
from experts.tiny_models import tiny_model
from PIL import Image

from genlight import cli
from genlight.config_check import check, resolved
from genlight.data.tiny_tasks import MAX_LENGTH, WORDS, TinyTasksDataModule
from genlight.data.tokenizer import character_tokenizer
from genlight.sweep import jobs_of

_COMMAND = re.compile(
    r"^\s*(?:\$ )?(?:(?:srun|torchrun) .*?)?(?:\S*python )?-m genlight ((?:fit|validate|inspect) .*)$"
)
_OTHER = re.compile(
    r"(?:^ {4}|`| {5}|<data> )((?:make [a-z]|python tools/|python -m genlight --)[^`#\n]*)", re.MULTILINE
)
_TIME = re.compile(r"\babout \d+ (second|minute)s?\b")
# what comes with genlight or its packages; all else is a file of the user or of others
_AT_HAND = ("digits", "tiny_tasks", "prompts")
# all of these is run, see test_add_a_method.py and test_add_a_model.py
_FOLLOWED = ("add_a_method", "add_a_model")
_FEW = ["data.num_samples=24", "data.eval_batch_size=24", "trainer.accelerator=cpu"]
_SEARCH = [
    *_FEW,
    "method.baselines=[frequency]",
    "method.random_draws=1",
    "method.calibration=24",
    "method.select=24",
    "search.budget=3",
    "search.strategy.prune_evaluations=2",
    "search.fidelity=24",
    "search.finalists=2",
]
# what is typed after commands that are run here, by a part that no other command has
SMALL = {
    "run.name=several": _SEARCH,
    "run.name=again": _FEW,
    "run.name=twice": _SEARCH,
    "experiment=ddpm/image_folder": [
        *(word for word in TINY if word.startswith("module.network")),
        "module.num_inference_steps=2",
        "data.root=pictures",
        "data.batch_size=4",
        "data.eval_batch_size=4",
        "data.num_samples=8",
        "trainer.accelerator=cpu",
    ],
}


def commands(page: Path) -> list[tuple[str, str]]:
    """The words of each command of a page and the comment behind it; those with an ellipsis are patterns."""
    found = []
    for line in page.read_text().replace("\\\n", " ").splitlines():
        matched = _COMMAND.match(line)
        if matched and "…" not in line:
            words, _, comment = matched[1].partition(" # ")
            words = re.sub(" +", " ", re.sub(r"<[^>]*>", "folder", words))
            found.append((words.strip(), comment.strip()))
    return found


ALL = {(words, comment): page for page in PAGES for words, comment in commands(page)}
OTHERS = sorted({words.strip() for page in PAGES for words in _OTHER.findall(page.read_text())})


def composed(words: str) -> dict[str, Any]:
    """The config of a command, as the command line itself composes and checks it."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    OmegaConf.register_new_resolver("genlight.cache", cli.cache_folder, replace=True)
    command, *others = [word for word in shlex.split(words, comments=True) if word not in cli.MULTIRUN]
    others = cli._of_inspection(command, list(jobs_of(others)[0].words))
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
    assert len(OTHERS) > 20


@pytest.mark.parametrize(
    ("words", "comment"), [each for each in ALL if "--config-dir" not in each[0]], ids=lambda text: text[:70]
)
def test_a_command_composes_and_says_what_it_needs(words: str, comment: str) -> None:
    wanted, page = needs(composed(words)), ALL[words, comment]
    assert bool(wanted) == comment.startswith("needs "), f"{page}: {wanted}, comment {comment!r}"
    is_run = page.stem in _FOLLOWED or any(part in words for part in SMALL)
    assert wanted or is_run or _TIME.search(comment), f"{page}: {words}: no test runs it, say `# about … minutes`"


def test_commands_run_as_they_stand_but_for_small_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    rows = TinyTasksDataModule.read_rows
    monkeypatch.setattr(TinyTasksDataModule, "read_rows", lambda self, name: rows(self, name)[::20])
    tokenizer, mixture = character_tokenizer(WORDS, MAX_LENGTH), Path("runs/eep/tiny_moe/fit/artifact")
    tiny_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=2 * MAX_LENGTH).save_pretrained(mixture)
    tokenizer.save_pretrained(mixture)
    Path("pictures").mkdir()
    for number in range(40):
        Image.new("RGB", (32, 32), (6 * number, 0, 0)).save(f"pictures/{number}.png")
    for part, small in SMALL.items():
        (words,) = {words for words, _ in ALL if part in words}
        assert cli.main([*shlex.split(words), *small]) == 0, words
        if part == "run.name=several":
            for name, count in (("eep", 2), ("four", 4)):
                shutil.copytree(f"runs/several/validate/artifact/{count}_experts", f"runs/{name}/validate/artifact")


def test_make_knows_every_target_and_every_program_is_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for _, target, *options in (words.split() for words in OTHERS if words.startswith("make ")):
        assert target in targets
        for option in options:
            assert (ROOT / "tools" / "proofs" / f"{option.removeprefix('NAME=')}.py").is_file(), option
    programs = [words.split()[1] for words in OTHERS if words.startswith("python tools/")]
    assert programs and all((ROOT / program).is_file() for program in programs)


class Parsed(Exception):
    """A program has taken its words."""


@pytest.mark.parametrize("words", [words for words in OTHERS if re.match(r"python tools/\S+ \S", words)])
def test_a_program_takes_its_words(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, arguments: Any = None) -> None:
        parse_args(self, arguments)
        raise Parsed

    _, *typed = shlex.split(words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.syspath_prepend(str((ROOT / typed[0]).parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / typed[0]), run_name="__main__")


@pytest.mark.parametrize("words", [words for words in OTHERS if words.startswith("python -m genlight --")])
def test_a_flag_is_taken(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--rerun` itself is tested in test_rerun.py: here there is no run."""
    monkeypatch.chdir(tmp_path)
    typed = shlex.split(words)[3:]
    assert cli.main(typed) == (cli.USAGE_ERROR if cli.RERUN in typed else 0)
    if cli.RERUN in typed:
        assert typed[-1] in the_error(capsys.readouterr().err)


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
