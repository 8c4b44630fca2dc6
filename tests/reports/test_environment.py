"""Secrets stay out of what is written; revision, versions and machine are those of this process."""

import subprocess
import sys
from pathlib import Path

from genlight.reports import environment as env

SECRET = "s3cr3tvalue"


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
    assert env.git_diff() == ""
    module.write_text("changed = 'hf_abcdefghijklmnop'\n")
    assert env.git_state() == (revision, True)
    assert "+changed = '***'" in env.git_diff()


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
