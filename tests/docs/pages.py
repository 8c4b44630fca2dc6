"""What a page shows as files, programs and commands, and a folder in which they are tried."""

import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from genlight.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FILE = re.compile(r"^`([\w./-]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$|((?:^ {4,}\S[^\n]*\n\n*)+)", re.MULTILINE | re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """Fenced blocks below a line that is a file name and nothing else, by that name."""
    return dict(_FILE.findall((ROOT / page).read_text()))


def programs_of(page: str) -> list[str]:
    """Its Python, in the order of the page: fenced blocks, and indented ones that begin with an import."""
    blocks = [textwrap.dedent(fenced or indented) for fenced, indented in _PYTHON.findall((ROOT / page).read_text())]
    return [block for block in blocks if block.startswith(("import ", "from "))]


def commands_of(page: str) -> list[list[str]]:
    """The lines of its bash blocks, as words; a line that ends with a backslash goes on."""
    text = "\n".join(_COMMANDS.findall((ROOT / page).read_text())).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def follow(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, small: Sequence[str] = ()) -> list[list[str]]:
    """Write the files of a page into a folder and run its commands there, in this process; returns the commands.

    ``small`` is typed after those of genlight.
    """
    for name, text in files_of(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # as `python -m` does
    commands = commands_of(page)
    for python, flag, module, *words in commands:
        assert (python, flag) == ("python", "-m"), module
        done = main([*words, *small]) if module == "genlight" else {"pytest": pytest.main}[module]([*words])
        assert done == 0, words
    return commands
