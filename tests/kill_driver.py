"""Run a command of genlight and SIGKILL the process at a moment of its writing.

python kill_driver.py MOMENT FOLDER WORDS...
"""

import os
import signal
import sys
from pathlib import Path

from genlight.cli import main
from genlight.io import primitives

moment, folder, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]


def hook(primitive: str, path: Path) -> None:
    done = len(list(folder.glob("checkpoints/step-*.ckpt")))
    due = {
        "first checkpoint": done == 1,
        "inside a save": done == 1 and primitive == "rename" and "step-000004" in str(path),
        "after the last step": (folder / "checkpoints" / "step-000006.ckpt").exists(),
    }
    if due[moment]:
        os.kill(os.getpid(), signal.SIGKILL)


primitives.before_primitive = hook
sys.argv = [sys.argv[0], *words]
sys.exit(main(words))
