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

from genlight.guards import Constructor

MAX_DEPTH = 8


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation and default as syntax trees (None if it has none), and whether it must be given."""

    name: str
    annotation: ast.expr | None
    required: bool
    default: ast.expr | None = None
    module: str = ""


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
    return _function_signature(node, module, skip_first=False)


def constructor(target: str) -> Constructor | None:
    """The constructor of a class of genlight; None for functions and for the classes of others."""
    found = _find(target, 0)
    if found is None or not isinstance(found[0], ast.ClassDef) or not found[1].startswith("genlight."):
        return None
    line = list(_line_of_descent(found[0], found[1]))
    methods: dict[str, ast.FunctionDef] = {}
    attributes: dict[str, Any] = {}
    for node, _ in reversed(line):
        methods |= {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        attributes |= _constants(node.body)
    name = "__init__" if "__init__" in methods else "__post_init__"
    body = methods.get(name)
    tree = next((_parse(module) for node, module in line if body in node.body), None)
    if body is None or tree is None:
        return None
    functions = {item.name: item for item in tree.body if isinstance(item, ast.FunctionDef)}
    return Constructor(body.body, methods, functions, _constants(tree.body), attributes, name == "__post_init__")


def _constants(body: list[ast.stmt]) -> dict[str, Any]:
    """Plain values that a module or a class gives to names once and for all."""
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Tuple | ast.List):
            for target in node.targets:
                try:
                    found[ast.unparse(target)] = ast.literal_eval(node.value)
                except ValueError:
                    continue
    return found


def expanded(parameter: Parameter) -> ast.expr | None:
    """The annotation of an argument, with the name of a union or of a list of values (`Draw = Literal[…]`) replaced by
    what it stands for."""
    return None if parameter.annotation is None else _without_aliases(parameter.annotation, parameter.module, 0)


def _without_aliases(node: ast.expr, module: str, depth: int) -> ast.expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Name):
        found = _alias(module, node.id, depth)
        return node if found is None else _without_aliases(*found, depth + 1)
    if isinstance(node, ast.BinOp):
        sides = (_without_aliases(side, module, depth) for side in (node.left, node.right))
        return ast.BinOp(next(sides), node.op, next(sides))
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        options = [_without_aliases(option, module, depth) for option in inner]
        return ast.Subscript(node.value, ast.Tuple(options) if len(options) > 1 else options[0])
    return node


_PLAIN = {"int", "float", "bool", "str", "None", "Any", "Path", "Sequence", "Mapping", "Callable"}


def _alias(module: str, name: str, depth: int) -> tuple[ast.expr, str] | None:
    """What a name of a module stands for, if it is a union or a list of values, and the module that says so."""
    if name in _PLAIN or depth >= MAX_DEPTH or (tree := _parse(module)) is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            is_list = isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) in ("Literal", "Union")
            return (node.value, module) if is_list else None
        if isinstance(node, ast.ClassDef) and node.name == name:
            return None
    for source, original in _imports(module).get(name, ()):
        return _alias(source, original, depth + 1)
    return None


def definitions(target: str) -> list[ast.ClassDef | ast.FunctionDef]:
    """The source of a class of genlight and of those that it is derived from, or of a function."""
    found = _find(target, 0)
    if found is None:
        return []
    node, module = found
    return [node] if isinstance(node, ast.FunctionDef) else [inner for inner, _ in _line_of_descent(node, module)]


def _line_of_descent(node: ast.ClassDef, module: str) -> Iterator[tuple[ast.ClassDef, str]]:
    """A class and those that it is derived from within genlight, nearest first."""
    yield node, module
    for base in node.bases:
        found = _find(f"{module}.{ast.unparse(base).split('[')[0]}", 1)
        if found is not None and isinstance(found[0], ast.ClassDef) and found[1].startswith("genlight."):
            yield from _line_of_descent(found[0], found[1])


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
    for source, original in _imports(module).get(name, ()):
        found = _find(f"{source}.{original}", depth + 1)
        if found is not None:
            return found
    return None


@cache
def _imports(module: str) -> dict[str, list[tuple[str, str]]]:
    """Every ``from x import y as name`` of a module: ``name`` to pairs (x, y), relative ones made absolute."""
    file, tree = _module_file(module), _parse(module)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    found: dict[str, list[tuple[str, str]]] = {}
    for node in _import_statements(tree.body if tree is not None else []):
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        source = node.module or "" if node.level == 0 else ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            found.setdefault(alias.asname or alias.name, []).append((source, alias.name))
    return found


def _import_statements(body: list[ast.stmt]) -> Iterator[ast.ImportFrom]:
    """Those of a module itself, in conditions and attempts too: a function's are its own affair."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            yield from _import_statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _import_statements([*node.body, *(s for h in node.handlers for s in h.body), *node.orelse])


def _class_signature(node: ast.ClassDef, module: str, depth: int) -> Signature | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            own = _function_signature(item, module, skip_first=True)
            # genlight passes further keywords on to its base class; what others do with theirs cannot be read off
            if not own.open or not module.startswith("genlight."):
                return own
            inherited = _base_signature(node, module, depth)
            if inherited is None:
                return own
            return Signature({**inherited.parameters, **own.parameters}, open=inherited.open)
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        own_fields = {
            item.target.id: Parameter(item.target.id, item.annotation, item.value is None, item.value, module)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
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


def _function_signature(node: ast.FunctionDef, module: str, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    defaults = [*[None] * first_default, *arguments.defaults]
    parameters = {
        a.arg: Parameter(a.arg, a.annotation, default is None, default, module)
        for i, (a, default) in enumerate(zip(positional, defaults))
        if not (skip_first and i == 0)
    }
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        parameters[a.arg] = Parameter(a.arg, a.annotation, default is None, default, module)
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
        # diffusers writes tuple[int] for any number of them
        if name in {"tuple", "Tuple"} and len(inner) > 1 and ast.unparse(inner[1]) != "...":
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
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        null = ["null"] if ast.unparse(annotation.value) == "Optional" else []
        return " or ".join([*(describe(option) for option in inner), *null])
    return {"None": "null", "str": "text"}.get(ast.unparse(annotation), ast.unparse(annotation))
