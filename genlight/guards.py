"""The checks at the beginning of a constructor, carried out on config values without importing the class.

A constructor of genlight refuses a wrong value by `if <condition>: raise ValueError(<text>)`. Where condition and text
are made of its arguments and constants alone they are evaluated here, from the source, so that a value out of range is
refused as quickly as a misspelt key. Whatever cannot be evaluated this way is left to the constructor itself.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_COMPUTE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "len": len, "min": min, "max": max, "sum": sum, "abs": abs, "all": all, "any": any, "list": list, "tuple": tuple,
    "sorted": sorted, "set": set, "int": int, "float": float, "str": str, "bool": bool,
}  # fmt: skip
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": list}
_MAX_LENGTH = 1000


class _Unknown(Exception):
    """What only the constructor itself can tell."""


class _Returned(_Unknown):
    """A constructor, or a method that it calls, ends here."""


@dataclass(frozen=True)
class Constructor:
    """Statements of `__init__`, or of `__post_init__` of a dataclass, and what they may refer to.

    Attributes:
        body: the statements.
        methods: of the class and of those that it is derived from.
        functions: of the module of the class.
        constants: plain values of the module of the class, by name.
        attributes: plain values of the class, by name.
        is_dataclass: the arguments are attributes already.
    """

    body: list[ast.stmt]
    methods: Mapping[str, ast.FunctionDef]
    functions: Mapping[str, ast.FunctionDef]
    constants: Mapping[str, Any]
    attributes: Mapping[str, Any]
    is_dataclass: bool


@dataclass
class _Scope:
    """Values by name: arguments and loop variables, and attributes of the object under construction."""

    names: dict[str, Any]
    attributes: dict[str, Any]
    source: Constructor
    depth: int = 0

    def within(self, names: dict[str, Any]) -> _Scope:
        """The scope of a function that is called from this one."""
        return _Scope(names, self.attributes, self.source, self.depth + 1)


@dataclass(frozen=True)
class Refusal:
    """What a constructor says, and the arguments that its condition looks at."""

    arguments: tuple[str, ...]
    message: str


def refusal(constructor: Constructor, arguments: Mapping[str, Any]) -> Refusal | None:
    """What a constructor raises for these arguments; None where nothing, or where only it can tell.

    Args:
        constructor: its source.
        arguments: plain values by name, defaults included; what is not there counts as unknown.
    """
    attributes = {**constructor.attributes, **(arguments if constructor.is_dataclass else {})}
    scope = _Scope(dict(arguments), attributes, constructor)
    try:
        return _walk(constructor.body, scope)
    except _Unknown:
        return None


def _walk(body: list[ast.stmt], scope: _Scope) -> Refusal | None:
    """The first refusal of a list of statements.

    Raises:
        _Unknown: they may end here, so that what follows is not looked at.
    """
    for statement in body:
        found = _step(statement, scope)
        if found is not None:
            return found
    return None


def _step(node: ast.stmt, scope: _Scope) -> Refusal | None:
    if isinstance(node, ast.If):
        return _branch(node, scope)
    if isinstance(node, ast.For):
        return _loop(node, scope)
    if isinstance(node, ast.Return):
        raise _Returned
    if isinstance(node, ast.Assign):
        for target in node.targets:
            _assign(target, node.value, scope)
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        _assign(node.target, node.value, scope)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return _called(node.value, scope)
    else:
        _forget(node, scope)
    return None


def _called(node: ast.Call, scope: _Scope) -> Refusal | None:
    """A call that stands alone: methods of the class and functions of its module are followed."""
    name = ast.unparse(node.func)
    if name == "object.__setattr__":
        scope.attributes.pop(str(_value(node.args[1], scope)), None)
    is_own = name.startswith("self.")
    function = scope.source.methods.get(name[5:]) if is_own else scope.source.functions.get(name)
    if function is None or scope.depth >= 3:
        return None
    try:
        return _walk(function.body, scope.within(_bound(function, node, scope, skip=int(is_own))))
    except _Unknown:
        return None  # it ended


def _bound(function: ast.FunctionDef, node: ast.Call, scope: _Scope, skip: int) -> dict[str, Any]:
    """Arguments of a call by the names of its function; those whose value is unknown are left out."""
    positional = [argument.arg for argument in function.args.args[skip:]]
    given = [*zip(positional, node.args), *((word.arg, word.value) for word in node.keywords if word.arg)]
    known: dict[str, Any] = {}
    for name, value in given:
        try:
            known[name] = _value(value, scope)
        except _Unknown:
            continue
    if function.args.kwarg is None:
        return known
    named = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    rest = {name: value for name, value in known.items() if name not in named}
    return {**{name: value for name, value in known.items() if name in named}, function.args.kwarg.arg: rest}


def _forget(node: ast.AST, scope: _Scope) -> None:
    """What a statement that is not followed may have set is unknown from here on.

    Raises:
        _Unknown: it may have ended the constructor.
    """
    for inner in ast.walk(node):
        if isinstance(inner, ast.Return | ast.Break | ast.Continue):
            raise _Unknown
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            scope.names.pop(inner.id, None)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            scope.attributes.pop(inner.attr, None)


def _branch(node: ast.If, scope: _Scope) -> Refusal | None:
    try:
        holds = bool(_value(node.test, scope))
    except _Unknown:
        _forget(node, scope)
        return None
    if not holds:
        return _walk(node.orelse, scope)
    first = node.body[0]
    if not isinstance(first, ast.Raise):
        return _walk(node.body, scope)
    if not isinstance(first.exc, ast.Call) or ast.unparse(first.exc.func) not in ("ValueError", "UserError"):
        return None
    try:
        message = str(_value(first.exc.args[0], scope))
    except (_Unknown, IndexError):
        return None
    looked_at = [_argument(inner, scope) for inner in ast.walk(node.test)]
    return Refusal(tuple(name for name in looked_at if name), message)


def _argument(node: ast.AST, scope: _Scope) -> str:
    """The argument that a part of a condition stands for, or an empty text."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 2:
        return str(_value(node.args[1], scope))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return node.id if isinstance(node, ast.Name) and node.id in scope.names and node.id != "self" else ""


def _loop(node: ast.For, scope: _Scope) -> Refusal | None:
    try:
        items = list(_value(node.iter, scope))[:_MAX_LENGTH]
    except (_Unknown, TypeError):
        _forget(node, scope)
        return None
    for item in items:
        _bind(node.target, item, scope)
        found = _walk(node.body, scope)
        if found is not None:
            # `for name, value in (("population", population), …)`: the name says which
            named = [v for v in item if isinstance(v, str)] if isinstance(item, tuple) else []
            return Refusal(tuple(named[:1]), found.message) if named else found
    return None


def _assign(target: ast.expr, value: ast.expr, scope: _Scope) -> None:
    """A name or attribute takes its new value, or is unknown from here on."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, its_value in zip(target.elts, value.elts):
            _assign(one, its_value, scope)
        return
    try:
        _bind(target, _value(value, scope), scope)
    except _Unknown:
        _forget(target, scope)


def _bind(target: ast.expr, value: Any, scope: _Scope) -> None:
    if isinstance(target, ast.Name):
        scope.names[target.id] = value
    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
        scope.attributes[target.attr] = value
    elif isinstance(target, ast.Tuple) and isinstance(value, list | tuple) and len(value) == len(target.elts):
        for inner, part in zip(target.elts, value):
            _bind(inner, part, scope)
    else:
        raise _Unknown


def _value(node: ast.expr, scope: _Scope) -> Any:
    """The value of an expression; a node with a `_target_` is an object that is not there yet.

    Raises:
        _Unknown: it needs more than arguments and constants.
    """
    try:
        found = _evaluate(node, scope)
    except _Unknown:
        raise
    except Exception as error:  # the constructor itself will meet it, and say it better
        raise _Unknown from error
    if isinstance(found, dict) and "_target_" in found:
        raise _Unknown
    return found


def _evaluate(node: ast.expr, scope: _Scope) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return scope.names[node.id] if node.id in scope.names else scope.source.constants[node.id]
    if isinstance(node, ast.Attribute):
        return _attribute(node, scope)
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return tuple(_value(item, scope) for item in node.elts)
    if isinstance(node, ast.BoolOp):
        result: Any = None
        for part in node.values:
            result = _value(part, scope)
            if bool(result) is isinstance(node.op, ast.Or):
                return result
        return result
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, scope)
        return not inner if isinstance(node.op, ast.Not) else -inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, scope), _value(node.right, scope)
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            raise _Unknown  # a text or a list of any length
        return _COMPUTE[type(node.op)](left, right)
    if isinstance(node, ast.Compare):
        return _comparison(node, scope)
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, scope) else node.orelse, scope)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.UnaryOp):
        return _value(node.value, scope)[_value(node.slice, scope)]
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, scope) for part in node.values)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _comprehension(node, scope)
    if isinstance(node, ast.Call):
        return _call(node, scope)
    raise _Unknown


def _attribute(node: ast.Attribute, scope: _Scope) -> Any:
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        return scope.attributes[node.attr]
    if ast.unparse(node) in ("math.inf", "math.pi"):
        return getattr(math, node.attr)
    raise _Unknown


def _comparison(node: ast.Compare, scope: _Scope) -> bool:
    left = _value(node.left, scope)
    for symbol, right_node in zip(node.ops, node.comparators):
        right = _value(right_node, scope)
        if not _COMPARE[type(symbol)](left, right):
            return False
        left = right
    return True


def _comprehension(node: ast.GeneratorExp | ast.ListComp | ast.SetComp, scope: _Scope) -> list[Any]:
    if len(node.generators) != 1:
        raise _Unknown
    part, found = node.generators[0], []
    for item in list(_value(part.iter, scope))[:_MAX_LENGTH]:
        inner = scope.within(dict(scope.names))
        _bind(part.target, item, inner)
        if all(_value(test, inner) for test in part.ifs):
            found.append(_value(node.elt, inner))
    return found


def _call(node: ast.Call, scope: _Scope) -> Any:
    name = ast.unparse(node.func)
    if name == "getattr" and len(node.args) == 2:
        return scope.attributes[_value(node.args[1], scope)]
    if name == "isinstance" and len(node.args) == 2:
        kinds = [_TYPES[kind.strip()] for kind in ast.unparse(node.args[1]).strip("()").replace("|", ",").split(",")]
        return isinstance(_value(node.args[0], scope), tuple(kinds))
    if name == "math.isfinite":
        return math.isfinite(_value(node.args[0], scope))
    if isinstance(node.func, ast.Attribute) and node.func.attr == "items" and not node.args:
        return tuple(_value(node.func.value, scope).items())
    arguments = [_value(item, scope) for item in node.args]
    if isinstance(node.func, ast.Attribute) and node.func.attr == "join" and isinstance(node.func.value, ast.Constant):
        return str(node.func.value.value).join(arguments[0])
    if node.keywords or name not in _CALLS:
        raise _Unknown
    return _CALLS[name](*arguments)


def _text(node: ast.expr, scope: _Scope) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.FormattedValue):
        raise _Unknown
    value = _value(node.value, scope)
    shown = repr(value) if node.conversion == ord("r") else value
    return format(shown, str(_value(node.format_spec, scope)) if node.format_spec is not None else "")
