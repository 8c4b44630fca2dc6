"""The whole model of a run whose weights lie in shards."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.trainer.sharded_folder import check_sharded_checkpoint, read_weights


def consolidated_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The full weights of a checkpoint of any strategy, as one process without that strategy can load them.

    Args:
        path: a folder written under DeepSpeed, or a single checkpoint file (one device, DDP, FSDP).

    Returns:
        the state dict of the module on the CPU; under mixed precision the fp32 master weights. Where the run averaged
        its weights, these are the averaged ones, as in every other checkpoint.

    Raises:
        UserError: if there is nothing at `path`, or it was not written here.
        CorruptFileError: if a file has changed since it was written.
    """
    if Path(path).is_dir():
        check_sharded_checkpoint(path)
        return read_weights(path)
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    from genlight.trainer.checkpoint_io import AtomicCheckpointIO

    state: dict[str, Tensor] = AtomicCheckpointIO().load_checkpoint(Path(path))["state_dict"]
    return state


def gather_full_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Assembles the state dict of a module that DeepSpeed trains; every process must call it.

    One parameter at a time is gathered on the device and moved to the CPU, so that the device never holds the whole
    model.

    Args:
        module: the module given to ``deepspeed.initialize``, not the engine around it.
        keep: whether this process needs the result; the others take part in the communication only.

    Returns:
        the fp32 master copy of every trained parameter, and every other parameter and persistent buffer as it is, by
        the names of ``module.state_dict()``; empty without `keep`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    full: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in module.state_dict().items():
        parameter = parameters.get(name)
        if parameter is None:
            if keep and isinstance(value, Tensor):
                full[name] = value.detach().cpu().clone()
            continue
        # a shared parameter is gathered once; every process meets the names in the same order
        if id(parameter) not in copies:
            copies[id(parameter)] = _full_parameter(parameter, keep)
            gathered = copies[id(parameter)]
        else:
            gathered = copies[id(parameter)].clone()
        if keep:
            full[name] = gathered
    return full


def _full_parameter(parameter: nn.Parameter, keep: bool) -> Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = hasattr(parameter, "ds_id")
    trained = hasattr(parameter, "_z3_optimizer") if partitioned else hasattr(parameter, "_hp_mapping")
    with torch.no_grad():
        if trained and parameter.requires_grad:
            gathered = safe_get_full_fp32_param(parameter)
            return gathered.detach().cpu().clone() if keep else torch.empty(0)
        if partitioned:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().cpu().clone() if keep else torch.empty(0)
    return parameter.detach().cpu().clone() if keep else torch.empty(0)
