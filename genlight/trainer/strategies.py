"""Strategies for more than one process, with checkpoints that hold no pickle and appear whole or not at all.

DDP and the single device are Lightning's own classes: their checkpoint is one file, written by the checkpoint plugin.
DeepSpeed and FSDP bring file formats of their own; the subclasses here replace these and change nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.stochastic_weight_avg import StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from typing_extensions import override

from genlight.errors import UserError
from genlight.trainer import sharded_folder
from genlight.trainer.checkpoint_io import AtomicCheckpointIO, progress_labels
from genlight.trainer.consolidate import gather_full_weights
from genlight.trainer.deepspeed_engine import safe_checkpoint_engine

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

# entries of Lightning's checkpoint that lie in the shards and in the consolidated weights
_HELD_ELSEWHERE = ("state_dict", "optimizer_states", "current_model_state")


def automatic() -> str:
    """One device; with ``trainer.devices`` above 1, Lightning's choice (DDP)."""
    return "auto"


def require_gpu(strategy_name: str) -> None:
    """Raises UserError, naming the way out, if torch sees no GPU."""
    if not torch.cuda.is_available():
        same = "strategy=deepspeed_cpu (the same engine on CPU processes)" if "deepspeed" in strategy_name else ""
        raise UserError(
            f"strategy={strategy_name} needs an NVIDIA GPU and torch sees none here: use "
            f"{same + ' or ' if same else ''}strategy=ddp with trainer.accelerator=cpu"
        )


def check_callbacks(strategy: Strategy | str, callbacks: Iterable[Callback], precision: str | None = None) -> None:
    """Refuses callbacks that would be silently wrong under a sharding strategy.

    Lightning's weight averaging copies the module before it is sharded and then pairs its parameters with the shards.
    Under ZeRO-1 and ZeRO-2 every process holds the whole module, and the strategies here keep the averaged weights in
    the checkpoint; in 16 bits, though, each validation would round the average to the precision of the module.

    Args:
        strategy: what the trainer is given.
        callbacks: the trainer's callbacks.
        precision: the trainer's ``precision``.

    Raises:
        UserError: naming the callback and the way out.
    """
    averaging = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    if not averaging or isinstance(strategy, str):
        return
    name = type(averaging[0]).__name__
    way_out = "leave it out (~callbacks.ema) or use strategy=ddp"
    if isinstance(strategy, FSDPStrategy):
        raise UserError(f"{name} cannot average weights that FSDP has sharded: {way_out}")
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    if strategy.zero_stage_3:
        raise UserError(f"{name} cannot average weights that ZeRO-3 has sharded: {way_out} or strategy=deepspeed_zero2")
    if isinstance(averaging[0], StochasticWeightAveraging):
        raise UserError(f"{name} does not work under DeepSpeed: {way_out}")
    if precision is not None and "16" in str(precision):
        raise UserError(
            f"{name} under DeepSpeed would round the average to 16 bits (trainer.precision={precision}): {way_out} or "
            "trainer.precision=32-true"
        )


def _is_fitting(strategy: Any) -> bool:
    return bool(strategy.lightning_module.trainer.state.fn == TrainerFn.FITTING)


class _SafeDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed with checkpoints as described in `genlight.trainer.sharded_folder`."""

    @property
    def _module(self) -> Any:
        return self.lightning_module

    @property
    def _stage(self) -> int:
        config: Any = self.config
        return int(config["zero_optimization"]["stage"])

    @override
    def setup(self, trainer: Any) -> None:
        check_callbacks(self, trainer.callbacks, str(trainer.precision))
        super().setup(trainer)

    @override
    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        self.deepspeed_engine.checkpoint_engine = safe_checkpoint_engine()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options have no meaning for a sharded checkpoint, got {storage_options!r}")
        path = Path(self.broadcast(os.fspath(filepath)))
        try:
            self._write_folder(checkpoint, path)
        except Exception:
            if self.is_global_zero:
                # on a full disk this gives the room back
                sharded_folder.drop_staging(path)
            raise

    def _write_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        staging = sharded_folder.staging_folder(path)
        self._on_process_zero(lambda: sharded_folder.make_staging(path), f"cannot write the checkpoint {path}")
        # DeepSpeed writes a `latest` file in place when asked to: the one tag of this folder needs none
        self.deepspeed_engine.save_checkpoint(
            str(staging),
            tag=sharded_folder.SHARDS,
            save_latest=False,
            exclude_frozen_parameters=self.exclude_frozen_parameters,
        )
        error = self.deepspeed_engine.checkpoint_engine.error
        self._raise_together(error, f"cannot write a shard of the checkpoint {path}")

        weights = gather_full_weights(self._module, keep=self.is_global_zero)
        averaged = "current_model_state" in checkpoint
        if averaged:
            weights = {name: value.detach().cpu() for name, value in checkpoint["state_dict"].items()}
        state = {
            "world_size": self.world_size,
            "stage": self._stage,
            "averaged": averaged,
            "checkpoint": {key: value for key, value in checkpoint.items() if key not in _HELD_ELSEWHERE},
        }

        def write() -> None:
            sharded_folder.write_common(staging, weights, state, progress_labels(checkpoint))
            sharded_folder.commit(path)

        self._on_process_zero(write, f"cannot write the checkpoint {path}")

    @override
    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
        fitting = _is_fitting(self)
        if path.is_file():
            return self._load_single_file(path, fitting)
        self._on_process_zero(lambda: sharded_folder.check_sharded_checkpoint(path), f"cannot read {path}")
        state = sharded_folder.read_trainer_state(path)
        checkpoint: dict[str, Any] = state["checkpoint"]
        checkpoint["state_dict"] = sharded_folder.read_weights(path)
        if not fitting:
            return checkpoint
        self._check_layout(path, state)
        self.deepspeed_engine.load_checkpoint(
            str(path),
            tag=sharded_folder.SHARDS,
            load_lr_scheduler_states=False,
            load_module_strict=self._module.strict_loading,
        )
        if state["averaged"]:
            # the averaging callback loads both, the second one into the module
            current = self._module.state_dict()
            checkpoint["current_model_state"] = {name: value.detach().clone() for name, value in current.items()}
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if _is_fitting(self):
            return  # loaded by the engine, shard by shard
        if self.zero_stage_3:
            self._restore_zero_state(checkpoint, strict=strict)
        else:
            self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @override
    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        if self.is_global_zero and Path(filepath).is_dir():
            sharded_folder.remove(filepath)
        else:
            super().remove_checkpoint(Path(filepath))

    def _load_single_file(self, path: Path, fitting: bool) -> dict[str, Any]:
        if fitting:
            raise UserError(
                f"{path} was written without DeepSpeed: its optimizer state cannot be split over the processes. "
                "Continue with the strategy that wrote it"
            )
        return AtomicCheckpointIO().load_checkpoint(path)

    def _check_layout(self, path: Path, state: Mapping[str, Any]) -> None:
        if (state["world_size"], state["stage"]) != (self.world_size, self._stage):
            raise UserError(
                f"{path} was written by {state['world_size']} processes under ZeRO-{state['stage']}, this run has "
                f"{self.world_size} under ZeRO-{self._stage}: DeepSpeed cannot redistribute the optimizer state. "
                "Continue with the same number and stage, or start a new run from the weights (docs/multi_node.md)"
            )

    def _on_process_zero(self, action: Any, what: str) -> None:
        """Runs `action` on process 0 alone; if it fails, every process raises instead of waiting for ever."""
        error: Exception | None = None
        if self.is_global_zero:
            try:
                action()
            except Exception as caught:
                error = caught
        self._raise_together(error, what)

    def _raise_together(self, error: Exception | None, what: str) -> None:
        if self.reduce_boolean_decision(error is None, all=True):
            return
        if error is not None:
            raise error
        raise UserError(f"{what}: another process failed, see its message")


class GPUDeepSpeedStrategy(_SafeDeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3 on GPUs; arguments as in Lightning's ``DeepSpeedStrategy``."""

    def __init__(self, stage: int = 2, **options: Any) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"strategy.stage must be 1, 2 or 3, got {stage!r}")
        if stage < 3 and options.get("offload_parameters"):
            raise ValueError(f"strategy.offload_parameters needs stage 3, got stage {stage}")
        require_gpu(f"deepspeed_zero{stage}")
        super().__init__(stage=stage, **options)

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise UserError(
                "a DeepSpeed strategy needs trainer.accelerator=gpu; on CPU processes use strategy=deepspeed_cpu"
            )
        super().setup_environment()


class DeepSpeedCPUStrategy(_SafeDeepSpeedStrategy):
    """The same engine on CPU processes over gloo, for tests and small machines.

    Args:
        stage: ZeRO stage 1, 2 or 3.
        bucket_size: elements that are reduced or gathered at once; each process holds buffers of this size.
        options: as in Lightning's ``DeepSpeedStrategy``.
    """

    def __init__(self, stage: int = 2, bucket_size: int = 5_000_000, **options: Any) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"strategy.stage must be 1, 2 or 3, got {stage!r}")
        # read when deepspeed is imported, which the parent's constructor does
        os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(
            stage=stage,
            process_group_backend="gloo",
            reduce_bucket_size=bucket_size,
            allgather_bucket_size=bucket_size,
            overlap_comm=False,
            **options,
        )

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed asks for the index of the device
        return torch.device("cpu", 0)

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            raise UserError("strategy=deepspeed_cpu needs trainer.accelerator=cpu")
        # past the check for CUDA of the parent class
        super(DeepSpeedStrategy, self).setup_environment()

    @override
    def setup_distributed(self) -> None:
        import deepspeed

        # a shared-memory kernel that DeepSpeed compiles on first use: a minute, and a compiler, for what gloo does as
        # well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class FullStateFSDPStrategy(FSDPStrategy):
    """FSDP with the checkpoint in one file, written and read by the trainer's checkpoint plugin.

    Lightning reads a full FSDP checkpoint by ``torch.load``, past the plugin; its sharded form is pickled in part and
    is not offered. Arguments as in Lightning's ``FSDPStrategy``.
    """

    def __init__(self, state_dict_type: str = "full", **options: Any) -> None:
        if state_dict_type != "full":
            raise ValueError(
                f"strategy.state_dict_type must be full, got {state_dict_type!r}: sharded FSDP checkpoints hold "
                "pickled files; for sharded checkpoints use strategy=deepspeed_zero3"
            )
        require_gpu("fsdp")
        super().__init__(state_dict_type="full", **options)

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise UserError("strategy=fsdp needs trainer.accelerator=gpu; on CPU processes use strategy=ddp")
        super().setup_environment()

    @override
    def setup(self, trainer: Any) -> None:
        check_callbacks(self, trainer.callbacks, str(trainer.precision))
        by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        if trainer.state.fn == TrainerFn.FITTING and trainer.gradient_clip_val and not by_value:
            raise UserError(
                f"trainer.gradient_clip_val={trainer.gradient_clip_val:g} clips by a norm that Lightning does not know "
                "under FSDP: set trainer.gradient_clip_val=null, or use strategy=deepspeed_zero3"
            )
        super().setup(trainer)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        from torch.distributed.fsdp import FullStateDictConfig, OptimStateKeyType, StateDictType
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        path = self.broadcast(os.fspath(checkpoint_path))
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path)
        config = FullStateDictConfig(rank0_only=False)
        model: Any = self.model
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
            model.load_state_dict(
                checkpoint["state_dict"], strict=getattr(self.lightning_module, "strict_loading", True)
            )
            states = checkpoint.get("optimizer_states", [])
            if not _is_fitting(self):
                return checkpoint
            if len(states) != len(self.optimizers):
                raise UserError(
                    f"{path} holds {len(states)} optimizer states, this run has {len(self.optimizers)} optimizers"
                )
            for optimizer, state in zip(self.optimizers, states):
                by_name = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
                optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, by_name))
        return checkpoint


__all__ = [
    "DeepSpeedCPUStrategy",
    "FullStateFSDPStrategy",
    "GPUDeepSpeedStrategy",
    "automatic",
    "check_callbacks",
    "require_gpu",
]
