"""Nested Python state as JSON text plus a list of tensors, and back.

Plain scalars and texts stand for themselves; everything else is a JSON list whose first item is a tag. What is not
listed in `encode` is refused by name, so a library that puts a new kind of object into a checkpoint is noticed at the
first save.
"""

import base64
import math
import pathlib
from typing import TYPE_CHECKING, Any

from genlight.io.errors import CorruptFileError

if TYPE_CHECKING:
    import torch

MAX_STATE_DEPTH = 64
_NUMPY_KINDS = "biufc"


class Encoder:
    """Turns state into JSON values and collects its tensors, each distinct view of memory once.

    Args:
        root: how errors call the top of the structure.
    """

    def __init__(self, root: str = "state") -> None:
        self._root = root
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """Encode `value`; `path` are the subscripts that led to it.

        Raises:
            TypeError: a kind of object that has no encoding; the message gives its place.
            ValueError: nested too deeply.
        """
        if len(path) > MAX_STATE_DEPTH:
            raise ValueError(
                f"{self._where(path[:4])}… is nested deeper than {MAX_STATE_DEPTH} levels, or holds itself"
            )
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if kind in (list, tuple):
            items = [self.encode(item, (*path, f"[{index}]")) for index, item in enumerate(value)]
            return [kind.__name__, *items]
        if isinstance(value, dict):
            return ["dict", *self._pairs(value, path)]
        if kind in (bytes, bytearray):
            return ["bytes", base64.b64encode(value).decode("ascii")]
        if isinstance(value, pathlib.PurePath):
            return ["path", str(value)]
        return self._encode_array(value, path)

    def _pairs(self, value: dict[Any, Any], path: tuple[str, ...]) -> list[Any]:
        pairs = []
        for key, item in value.items():
            inner = (*path, f"[{key!r}]")
            if not isinstance(key, str | int | float | tuple | bytes | None):
                raise TypeError(f"{self._where(inner)}: a key of type {_name(key)} cannot be saved")
            pairs.append([self.encode(key, inner), self.encode(item, inner)])
        return pairs

    def _encode_array(self, value: Any, path: tuple[str, ...]) -> Any:
        import numpy
        import torch

        if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return self._encode_tensor(value, path)
        if type(value) is torch.Size:
            return ["size", *value]
        if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in _NUMPY_KINDS:
            order = value.dtype.newbyteorder("<")
            data = numpy.ascontiguousarray(value, dtype=order).reshape(-1).view(numpy.uint8)
            tag = "ndarray" if isinstance(value, numpy.ndarray) else "number"
            name = self._add(torch.from_numpy(data.copy()))
            return [tag, order.str, list(value.shape), name]
        raise TypeError(
            f"{self._where(path)} is a {_name(value)}, which cannot be saved: use tensors, numbers, texts, bytes, "
            "paths, lists, tuples and dicts"
        )

    def _encode_tensor(self, value: "torch.Tensor", path: tuple[str, ...]) -> Any:
        import torch

        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(
                f"{self._where(path)} is a tensor without plain memory (layout {value.layout}, device {value.device}): "
                "it cannot be saved"
            )
        view = (
            value.device,
            value.dtype,
            value.data_ptr(),
            tuple(value.shape),
            value.stride(),
            value.is_conj(),
            value.is_neg(),
        )
        name = self._names.get(view) if value.numel() else None
        if name is None:
            name = self._add(value.detach())
            self._names[view] = name
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), name]

    def _add(self, tensor: "torch.Tensor") -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def _where(self, path: tuple[str, ...]) -> str:
        return self._root + "".join(path)


class Decoder:
    """Turns the JSON values of an `Encoder` back into state. Shared views come back as one tensor."""

    def __init__(self, tensors: "dict[str, torch.Tensor]", file: str) -> None:
        self._tensors = tensors
        self._file = file

    def decode(self, value: Any) -> Any:
        """Decode one value.

        Raises:
            CorruptFileError: not something that an `Encoder` writes.
        """
        if not isinstance(value, list):
            if isinstance(value, dict):
                raise self._unknown(value)
            return value
        try:
            tag, *rest = value
            return self._decode_tagged(tag, rest)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            raise self._unknown(value) from None

    def _decode_tagged(self, tag: str, rest: list[Any]) -> Any:
        if tag == "list":
            return [self.decode(item) for item in rest]
        if tag == "tuple":
            return tuple(self.decode(item) for item in rest)
        if tag == "dict":
            return {self.decode(key): self.decode(item) for key, item in rest}
        if tag == "bytes":
            return base64.b64decode(rest[0], validate=True)
        if tag == "path":
            return pathlib.Path(rest[0])
        if tag == "float" and rest[0] in ("nan", "inf", "-inf"):
            return float(rest[0])
        return self._decode_array(tag, rest)

    def _decode_array(self, tag: str, rest: list[Any]) -> Any:
        import numpy
        import torch

        if tag == "size":
            return torch.Size(rest)
        if tag == "tensor":
            dtype, shape, name = rest
            tensor = self._tensors[name]
            if str(tensor.dtype) != f"torch.{dtype}" or list(tensor.shape) != shape:
                raise ValueError("the structure and the tensors disagree")
            return tensor
        if tag in ("ndarray", "number"):
            order, shape, name = rest
            if numpy.dtype(order).kind not in _NUMPY_KINDS:
                raise ValueError(f"arrays of {order} are not saved")
            array = self._tensors[name].numpy().view(numpy.dtype(order)).reshape(shape)
            return array if tag == "ndarray" else array[()]
        raise ValueError(f"unknown tag {tag!r}")

    def _unknown(self, value: Any) -> CorruptFileError:
        return CorruptFileError(f"{self._file} holds a structure that is not known: {str(value)[:60]}")


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
