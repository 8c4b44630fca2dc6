"""Linear combinations along the expert axis, and neurons of experts in another order."""

import torch
from torch import Tensor

from genlight.experts.families import ExpertTensor
from genlight.experts.maps import chosen_rows
from genlight.quantization.kernels.available import triton_runs_on

# Columns of 16-bit weights that are widened to float32 at once
_BLOCK = 1 << 20


def mix(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Σ_i matrix[j, i] tensor[i]: a new tensor [rows, ...] of the type and on the device of `tensor`.

    Summed in float32 (float64 for float64 weights), always from the tensors given, so that nothing drifts. A one-hot
    matrix selects, bit for bit, and takes any type.

    Args:
        matrix: [rows, experts].
        tensor: [experts, ...].

    Raises:
        ValueError: a real-valued mixture of weights that are not floating point of 16 bits or more (quantized).
    """
    rows = chosen_rows(matrix)
    if rows is not None:
        return tensor.index_select(0, rows.to(tensor.device))
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"experts of type {tensor.dtype} can be pruned, not merged: dequantise the model first")
    flat = tensor.reshape(len(tensor), -1)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    matrix = matrix.to(tensor.device, wide)
    if wide == torch.float32 and triton_runs_on(tensor.device):
        from genlight.experts.mixing_kernel import mix_columns

        mixed = mix_columns(matrix, flat)
    else:
        mixed = _mixed_in_blocks(matrix, flat)
    return mixed.view(len(matrix), *tensor.shape[1:])


def _mixed_in_blocks(matrix: Tensor, flat: Tensor) -> Tensor:
    """As `mix`, of weights [experts, columns]: products of blocks, so that few are widened at a time."""
    if flat.dtype == matrix.dtype:
        return matrix @ flat
    mixed = flat.new_empty(len(matrix), flat.shape[1])
    for start in range(0, flat.shape[1], _BLOCK):
        mixed[:, start : start + _BLOCK] = matrix @ flat[:, start : start + _BLOCK].to(matrix.dtype)
    return mixed


def reorder_neurons(description: ExpertTensor, tensor: Tensor, orders: Tensor) -> Tensor:
    """The same experts with their hidden neurons in another order: neuron n of expert e was neuron orders[e, n].

    Args:
        description: of the tensor.
        tensor: [experts, ...].
        orders: int64 [experts, I].
    """
    if description.neurons is None:
        return tensor
    orders = orders.to(tensor.device)
    if description.pairing == "halves":
        orders = torch.cat([orders, orders + orders.shape[1]], dim=1)
    elif description.pairing == "interleaved":
        orders = torch.stack([2 * orders, 2 * orders + 1], dim=2).flatten(1)
    return torch.stack([tensor[e].index_select(description.neurons - 1, order) for e, order in enumerate(orders)])


def neuron_features(descriptions: tuple[ExpertTensor, ...], tensors: dict[str, Tensor]) -> Tensor:
    """All weights of each hidden neuron, float32 [experts, I, features], for comparing neurons of different experts."""
    parts = []
    for description in descriptions:
        if description.neurons is None:
            continue
        tensor = tensors[description.name].float().movedim(description.neurons, 1)
        if description.pairing == "halves":
            tensor = torch.unflatten(tensor, 1, (2, -1)).transpose(1, 2)
        elif description.pairing == "interleaved":
            tensor = torch.unflatten(tensor, 1, (-1, 2))
        width = tensor.shape[1]
        parts.append(tensor.reshape(len(tensor), width, -1))
    return torch.cat(parts, dim=2)
