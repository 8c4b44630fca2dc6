"""Write docs/reference/options.md, the page of all config keys, from conf/ and the docstrings."""

from pathlib import Path

from genlight.options import reference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"

PAGE.parent.mkdir(exist_ok=True)
PAGE.write_text(reference())
print(f"wrote {PAGE}")
