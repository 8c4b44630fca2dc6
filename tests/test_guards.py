"""The source of a constructor, evaluated, says what the constructor itself says."""

import ast
from typing import Any

import pytest

from genlight import signatures
from genlight.config_check import targets
from genlight.guards import Constructor, refusal

SOURCE = """
def __init__(self, size, share=0.5, names=("a",), kind=None, other=None):
    if other is not None and other.unknown():
        self.size = 0
    if size < 1:
        raise ValueError(f"size = {size!r} must be 1 or more")
    self.size, self.rest = size, other.rest
    for name, value in (("share", share),):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value:.1f} must lie in [0, 1]")
    positive(count=len(names))
    self.check()
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"kind = {kind} must be {', '.join(KINDS)}")

def check(self):
    if self.size % 2:
        raise ValueError("size must be even")
    if self.rest > 3:
        raise ValueError("rest is unknown here")

def positive(**values):
    for key, value in values.items():
        if value < 1:
            raise ValueError(f"{key} must be 1 or more")
"""


def refused(**arguments: Any) -> str | None:
    functions = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)}
    constructor = Constructor(functions["__init__"].body, functions, functions, {"KINDS": ("x", "y")}, {}, False)
    found = refusal(constructor, {"size": 2, "share": 0.5, "names": ["a"], "kind": None, "other": None, **arguments})
    return None if found is None else found.message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"size": 0}, "size = 0 must be 1 or more"),
        ({"share": 1.25}, "share = 1.2 must lie in [0, 1]"),
        ({"names": []}, "count must be 1 or more"),
        ({"size": 3}, "size must be even"),
        ({"kind": "z"}, "kind = z must be x, y"),
        ({"kind": "y"}, None),
        # an object that is still to be built may do anything to `self.size`, but not to the argument
        ({"size": 3, "other": {"_target_": "a.B"}}, "size must be even"),
        ({"size": 0, "other": {"_target_": "a.B"}}, "size = 0 must be 1 or more"),
    ],
)
def test_conditions_are_evaluated(arguments: dict[str, Any], expected: str | None) -> None:
    assert refused(**arguments) == expected


def test_what_may_have_ended_the_constructor_hides_what_follows() -> None:
    body = ast.parse("def f(a, b):\n if b.ready:\n  return\n if a < 1:\n  raise ValueError('a')").body[0].body  # type: ignore[attr-defined]
    assert refusal(Constructor(body, {}, {}, {}, {}, False), {"a": 0}) is None


@pytest.mark.parametrize("experiment", ["s3/digits", "oms/digits", "viditq/digits"])
def test_a_refusal_is_what_the_constructor_raises(experiment: str) -> None:
    """Every count of an experiment set to -1: where the source is said to refuse, the class does."""
    from bad_commands import composed
    from hydra.utils import get_class

    checked = 0
    for _, node in targets(composed(experiment)):
        found, signature = signatures.constructor(node["_target_"]), signatures.static_signature(node["_target_"])
        plain = {k: v for k, v in node.items() if k[0] != "_"}
        if found is None or signature is None or any("_target_" in str(v) for v in plain.values()):
            continue
        for name, value in plain.items():
            wrong = {**plain, name: -1}
            if isinstance(value, int) and (told := refusal(found, wrong)) is not None:
                with pytest.raises(ValueError) as raised:
                    get_class(node["_target_"])(**wrong)
                assert str(raised.value) == told.message
                checked += 1
    assert checked >= 5
