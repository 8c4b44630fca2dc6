"""Signatures of classes and functions read from their source, without importing them.

A config is checked against the constructors it names before anything heavy is imported: the annotation in the
constructor is the one schema there is. What cannot be read statically is left to the import-time check.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

MAX_DEPTH = 8


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation as a syntax tree (None if it has none) and whether it must be given."""

    name: str
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """Arguments by name; ``open`` when any further keyword is accepted."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


def static_signature(target: str) -> Signature | None:
    """Signature of the class or function at dotted path ``target``; None where the source cannot tell."""
    found = _find(target, 0)
    if found is None:
        return None
    node, module = found
    if isinstance(node, ast.ClassDef):
        return _class_signature(node, module, 0)
    return _function_signature(node, skip_first=False)


def exists(target: str) -> bool | None:
    """Whether ``target`` is there: True, False, or None where only an import can tell."""
    if _find(target, 0) is not None:
        return True
    return False if target.startswith("genlight.") else None


def names_in(module: str) -> list[str]:
    """Public classes and functions that ``module`` defines (for suggestions)."""
    tree = _parse(module)
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [n.name for n in (tree.body if tree else []) if isinstance(n, kinds) and not n.name.startswith("_")]


@cache
def _module_file(module: str) -> Path | None:
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        single = Path(spec.origin) if spec is not None and spec.origin and not rest else None
        return single if single is not None and single.suffix == ".py" and single.is_file() else None
    for root in spec.submodule_search_locations:
        path = Path(root, *rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py") if rest else path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _parse(module: str) -> ast.Module | None:
    file = _module_file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_bytes())
    except SyntaxError:
        return None


def _find(target: str, depth: int) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    module, _, name = target.rpartition(".")
    tree = _parse(module) if module and depth < MAX_DEPTH else None
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
    for source, original in _imports_of(tree, module, name):
        found = _find(f"{source}.{original}", depth + 1)
        if found is not None:
            return found
    return None


def _imports_of(tree: ast.Module, module: str, name: str) -> Iterator[tuple[str, str]]:
    """Where ``from x import name`` in a module's source says that ``name`` comes from."""
    file = _module_file(module)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                source = node.module or "" if node.level == 0 else ".".join(filter(None, [base, node.module]))
                yield source, alias.name


def _class_signature(node: ast.ClassDef, module: str, depth: int) -> Signature | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            own = _function_signature(item, skip_first=True)
            # genlight passes further keywords on to its base class; what others do with theirs cannot be read off
            if not own.open or not module.startswith("genlight."):
                return own
            inherited = _base_signature(node, module, depth)
            if inherited is None:
                return own
            return Signature({**inherited.parameters, **own.parameters}, open=inherited.open)
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [i for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)]
        own_fields = {f.target.id: Parameter(f.target.id, f.annotation, f.value is None) for f in fields}  # type: ignore[union-attr]
        inherited = _base_signature(node, module, depth) if node.bases else None
        return Signature({**(inherited.parameters if inherited else {}), **own_fields}, open=False)
    return _base_signature(node, module, depth)


def _base_signature(node: ast.ClassDef, module: str, depth: int) -> Signature | None:
    tree = _parse(module)
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        if tree is None or depth >= MAX_DEPTH or "." in name:
            return None
        found = _find(f"{module}.{name}", depth + 1)
        if found is None or not isinstance(found[0], ast.ClassDef):
            continue
        signature = _class_signature(found[0], found[1], depth + 1)
        if signature is not None:
            return signature
    return None


def _function_signature(node: ast.FunctionDef, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parameters = {
        a.arg: Parameter(a.arg, a.annotation, i < first_default)
        for i, a in enumerate(positional)
        if not (skip_first and i == 0)
    }
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        parameters[a.arg] = Parameter(a.arg, a.annotation, default is None)
    return Signature(parameters, open=arguments.kwarg is not None)


def accepts(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a plain config value fits an annotation; names that are no plain type accept anything."""
    if annotation is None:
        return True
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):
            return accepts(ast.parse(annotation.value, mode="eval").body, value)
        return value is None if annotation.value is None else True
    if isinstance(annotation, ast.BinOp):
        return accepts(annotation.left, value) or accepts(annotation.right, value)
    if isinstance(annotation, ast.Subscript):
        return _accepts_generic(annotation, value)
    return _accepts_name(ast.unparse(annotation).rsplit(".", 1)[-1], value)


def _accepts_generic(annotation: ast.Subscript, value: Any) -> bool:
    name = ast.unparse(annotation.value).rsplit(".", 1)[-1]
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if name == "Optional":
        return value is None or accepts(inner[0], value)
    if name == "Union":
        return any(accepts(option, value) for option in inner)
    if name == "Literal":
        return any(isinstance(o, ast.Constant) and o.value == value and type(o.value) is type(value) for o in inner)
    if name in {"list", "List", "Sequence", "Iterable", "tuple", "Tuple"}:
        if not isinstance(value, list):
            return False
        if name in {"tuple", "Tuple"} and not (len(inner) == 2 and ast.unparse(inner[1]) == "..."):
            return len(inner) == len(value) and all(accepts(a, v) for a, v in zip(inner, value))
        return all(accepts(inner[0], item) for item in value)
    if name in {"dict", "Dict", "Mapping"}:
        return isinstance(value, dict)
    return True


def _accepts_name(name: str, value: Any) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return name not in {"int", "float", "bool", "str"}
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "bool":
        return isinstance(value, bool)
    if name == "str":
        return isinstance(value, str)
    if name in {"list", "tuple", "Sequence"}:
        return isinstance(value, list)
    if name in {"dict", "Mapping"}:
        return isinstance(value, dict)
    return True


def describe(annotation: ast.expr | None) -> str:
    """An annotation in words for an error message, with the allowed values of a Literal."""
    if annotation is None:
        return "anything"
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Literal"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return "one of " + ", ".join(str(ast.literal_eval(option)) for option in inner)
    if isinstance(annotation, ast.BinOp):
        return f"{describe(annotation.left)} or {describe(annotation.right)}"
    return {"None": "null", "str": "text"}.get(ast.unparse(annotation), ast.unparse(annotation))
