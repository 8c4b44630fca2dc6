import ast
from typing import Any

import pytest

from genlight.signatures import accepts


@pytest.mark.parametrize(
    ("annotation", "value", "fits"),
    [
        ("tuple[int]", [8, 16], True),
        ("tuple[int]", [8, "x"], False),
        ("tuple[int]", 8, False),
        ("tuple[int, ...]", [8, 16, 32], True),
        ("tuple[int, str]", [8, "x"], True),
        ("tuple[int, str]", [8], False),
        ("list[int]", [8.5], False),
    ],
)
def test_lists_fit_what_libraries_write_for_them(annotation: str, value: Any, fits: bool) -> None:
    """diffusers writes `tuple[int]` where it takes any number of them."""
    assert accepts(ast.parse(annotation, mode="eval").body, value) is fits
