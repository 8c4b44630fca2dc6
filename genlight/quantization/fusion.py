"""What a network does right before it rounds a row, taken into the kernel that rounds it, in any network.

`torch.compile` writes a network's forward pass down as a graph, in which the kernel is a node. A norm, a modulation or
a GELU whose result goes to that node and nowhere else is there to see, whatever the network's code looks like; it
becomes an argument of the kernel, and its result is never written to memory. Layers that round the same input alike,
as query, key and value do, round it once:

    share_balances(network)
    network.compile(backend=fused)

Without Triton's kernels the graph holds no such node, and `fused` is the same as torch's own backend.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from genlight.quantization.convert import quantized_layers

_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)
_WRITES = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)
# change where numbers lie or what type they have
_CASTS = ("reshape", "view", "flatten", "unflatten", "contiguous", "to", "type_as", "float", "half", "bfloat16")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# arguments of the kernel, and the nodes that they stand for
_Step = tuple[dict[str, Any], list[fx.Node]]
# scale, signs and factors of the rotation
_Balance = tuple[Tensor | None, Tensor | None, tuple[int, ...]]
# names of the kernel's arguments, in its order
_ARGUMENTS = (
    "values", "bits", "symmetric", "numbers", "norm", "eps", "norm_weight", "norm_bias", "modulation_scale",
    "modulation_shift", "gelu", "input_scale", "signs", "order", "keep",
)  # fmt: skip


def share_balances(model: nn.Module) -> None:
    """Let quantized layers whose balances are equal hold the same tensors, so that a graph shows that they are.

    Casting or moving the model makes them its own again: call this last.
    """
    known: list[_Balance] = []
    for layer in quantized_layers(model).values():
        own = (layer.input_scale, layer.rotation_signs, layer.rotation_factors)
        same = next((other for other in known if _same_balance(own, other)), None)
        if same is None:
            known.append(own)
        else:
            layer.input_scale, layer.rotation_signs, _ = same


def fused(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Backend of `torch.compile`: `fuse_rows`, and then torch's own."""
    from torch._dynamo import lookup_backend

    fuse_rows(graph)
    compiled: Callable[..., Any] = lookup_backend("inductor")(graph, inputs)
    return compiled


def fuse_rows(graph: fx.GraphModule) -> int:
    """Rewrite a graph of torch's calls in place; it computes the same but for the rounding of what lies between.

    What is taken in is computed later than before, and calls that are merged earlier: neither passes a call that writes
    into a tensor.

    Returns:
        How many calls of the kernel took something in.
    """
    nodes = graph.graph
    _merge_equal(nodes)
    count = sum(_absorb(nodes, node) for node in list(nodes.nodes) if _is_kernel(node))
    graph.recompile()
    return count


def _same_balance(one: _Balance, other: _Balance) -> bool:
    return one[2] == other[2] and _equal(one[0], other[0]) and _equal(one[1], other[1])


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and one.shape == other.shape and torch.equal(one, other)


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and "genlight.row_codes" in str(node.target)


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return named or node.target in _WRITES or node.kwargs.get("inplace") is True or "out" in node.kwargs


def _merge_equal(nodes: fx.Graph) -> None:
    """Calls of the kernel with the same arguments, and reshapes before them, are made once."""
    known: dict[Any, fx.Node] = {}
    for node in list(nodes.nodes):
        if _writes(node):
            known.clear()
        elif _is_kernel(node) or (node.op == "call_method" and node.target == "reshape"):
            key = (node.target, node.args, tuple(node.kwargs.items()))
            if known.setdefault(key, node) is not node:
                node.replace_all_uses_with(known[key])
                nodes.erase_node(node)


def _absorb(nodes: fx.Graph, kernel: fx.Node) -> bool:
    """Give one call of the kernel what stands before it, if there is something."""
    given: dict[str, Any] = dict(zip(_ARGUMENTS, kernel.args)) | dict(kernel.kwargs)
    found, taken = _before(given["values"])
    if not found or _written_between(taken, kernel) or _type(found["values"]) not in _TYPES:
        return False
    width = _shape(found["values"])[-1]
    with nodes.inserting_before(kernel):
        for name in ("modulation_scale", "modulation_shift", "values"):
            if name in found:
                found[name] = nodes.call_method("reshape", (found[name], -1, width))
    kernel.args = tuple((given | found)[name] for name in _ARGUMENTS)
    kernel.kwargs = {}
    for node in taken:
        if not node.users:
            nodes.erase_node(node)
    return True


def _before(values: fx.Node) -> _Step:
    """Arguments of the kernel for all that stands before its values, and the nodes that they stand for."""
    found: dict[str, Any] = {"values": values}
    taken: list[fx.Node] = []
    for step in (_gelu, _modulation, _norm):
        casts = _casts(found["values"])
        node: Any = casts[-1].args[0] if casts else found["values"]
        arguments, own = step(node) if len(node.users) == 1 and _shape(node) else ({}, [])
        if arguments:
            found |= arguments
            taken += [*casts, *own]
    return (found, taken) if taken else ({}, [])


def _written_between(taken: Sequence[fx.Node], kernel: fx.Node) -> bool:
    left, node = set(taken), kernel.prev
    while left:
        if _writes(node):
            return True
        left.discard(node)
        node = node.prev
    return False


def _casts(node: fx.Node) -> list[fx.Node]:
    """Casts and reshapes, each read once, that end in a node; rows stay rows. The last of them comes first."""
    found: list[fx.Node] = []
    while len(node.users) == 1 and node.args and isinstance(node.args[0], fx.Node):
        before, after = _value(node.args[0]), _value(node)
        cast = node.op == "call_method" and node.target in _CASTS
        dropout = node.target is functional.dropout and not _argument(node, 2, "training", True)
        if before is None or after is None or not (cast or dropout):
            break
        if before.device != after.device or before.shape[-1] != after.shape[-1] or before.dtype not in _TYPES:
            break
        found.append(node)
        node = node.args[0]
    return found


def _gelu(node: fx.Node) -> _Step:
    if node.target is not functional.gelu:
        return {}, []
    form = _argument(node, 1, "approximate", "none")
    return {"values": node.args[0], "gelu": "tanh" if form == "tanh" else "exact"}, [node]


def _modulation(node: fx.Node) -> _Step:
    """x (1 + scale) + shift with a scale and a shift for each sample."""
    for product, shift in _sides(node, _ADD):
        if len(product.users) != 1:
            continue
        for values, factor in _sides(product, _MULTIPLY):
            scale = _one_less(factor)
            if scale is None or _shape(values) != _shape(node) or _shape(scale) != _shape(shift):
                continue
            if _is_of_sample(scale, node):
                found = {"values": values, "modulation_scale": scale, "modulation_shift": shift}
                return found, [node, product, factor]
    return {}, []


def _one_less(factor: fx.Node) -> fx.Node | None:
    """scale, of a node 1 + scale."""
    if factor.target not in _ADD or len(factor.args) != 2 or factor.kwargs or 1 not in factor.args:
        return None
    return next((side for side in factor.args if isinstance(side, fx.Node)), None)


def _norm(node: fx.Node) -> _Step:
    if node.target is functional.layer_norm:
        eps, bias = _argument(node, 4, "eps", 1e-5), _argument(node, 3, "bias", None)
    elif node.target in (functional.rms_norm, torch.rms_norm):
        eps, bias = _argument(node, 3, "eps", None), None
        # the library's default
        eps = torch.finfo(_type(node)).eps if eps is None else eps
    else:
        return {}, []
    if tuple(_argument(node, 1, "normalized_shape", ())) != _shape(node)[-1:]:
        return {}, []
    kind = "layer" if node.target is functional.layer_norm else "rms"
    weight = _argument(node, 2, "weight", None)
    return {"values": node.args[0], "norm": kind, "eps": eps, "norm_weight": weight, "norm_bias": bias}, [node]


def _sides(node: fx.Node, functions: tuple[Any, ...]) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the two nodes that a function is of."""
    if node.target not in functions or len(node.args) != 2 or node.kwargs:
        return []
    one, other = node.args
    return [(one, other), (other, one)] if isinstance(one, fx.Node) and isinstance(other, fx.Node) else []


def _is_of_sample(part: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor is [samples | 1, 1, …, features] beside [samples, …, features]."""
    small, large = _shape(part), _shape(node)
    if len(large) < 3 or len(small) != len(large):
        return False
    ones = all(size == 1 for size in small[1:-1])
    return ones and small[-1] == large[-1] and small[0] in (1, large[0])


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _value(node: fx.Node) -> Tensor | None:
    """The tensor that a node stands for, without numbers; None where it is no tensor."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = _value(node)
    return () if value is None else tuple(value.shape)


def _type(node: fx.Node) -> torch.dtype:
    value = _value(node)
    return torch.float64 if value is None else value.dtype
