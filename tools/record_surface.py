"""Record the command-line keys that users may rely on, after a deliberate change: tests/surface.json."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_architecture import surface  # noqa: E402

(ROOT / "tests" / "surface.json").write_text(json.dumps(surface(), indent=1) + "\n")
print("wrote tests/surface.json")
