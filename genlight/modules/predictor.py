"""Performance predictors trained in two steps: experts on low-fidelity scores, then all on a few true ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from genlight.errors import UserError, in_config
from genlight.metrics.ranking import RankingScores
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.predictors.expert_doubts import expert_doubts
from genlight.predictors.expert_heads import FittedExpertScores, FittedFusion, ScoreScale
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
from genlight.predictors.feature_heads import HEADS
from genlight.predictors.pool import Categories
from genlight.predictors.predictor_file import (
    FUSION,
    TrainedExperts,
    categories_of,
    describe,
    load_predictor,
    rebuild,
    save_predictor,
)

SAVED = "genlight_predictor"


class PredictorModule(Optimization, LightningModule):
    """DELE (Zhao et al., AAAI 2023, arXiv 2302.00932), its ablations, and regressions on its experts.

    Batches that are not to "finetune" train each expert to rank by its own low-fidelity score; the others train experts
    and gate to rank by the true score. At the first of those the gate begins anew, and so does the optimizer.
    Validation logs val/kendall_tau, val/spearman, val/p_at_1 and val/p_at_5 of the candidates held out.

    | predictor | config |
    |---|---|
    | DELE | module.head=fusion, module.network.gate=dynamic |
    | static gate | module.network.gate=static |
    | one low-fidelity score | data.low_fidelity=[name] |
    | no pretraining | data.low_fidelity=[] data.pretrain_steps=0 |
    | regression on frozen experts | module.head=gp, trainer.max_steps=${data.pretrain_steps} |

    Args:
        network: shape and loss of experts and gate.
        head: "fusion", or "gp", "ridge", "forest" on the frozen experts' standardised scores.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        keep_optimizer_state: go on with the moments of the first step in the second.

    Attributes:
        network: the experts and the gate; None before the data is known (``check_data``).
        pretrained_steps: data.pretrain_steps of the fit whose checkpoint was loaded; None: none was, or an old one.

    Raises:
        ValueError: another head.
    """

    def __init__(
        self,
        network: ExpertSettings,
        *,
        head: str = FUSION,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        keep_optimizer_state: bool = False,
    ) -> None:
        super().__init__()
        if head not in (FUSION, *HEADS):
            raise ValueError(f"module.head = {head} must be one of {', '.join((FUSION, *HEADS))}")
        self.settings, self.head = network, head
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.keep_optimizer_state = keep_optimizer_state
        self.network: ExpertEnsemble | None = None
        self.names: tuple[str, ...] = ()
        self.categories: Categories | None = None
        self.pretrained_steps: int | None = None
        self.metrics = RankingScores()
        self._data: Any = None
        self._pretrain_steps, self._facts = 0, dict[str, Any]()
        self._finetuning = False
        self._fitted: FittedFusion | FittedExpertScores | None = None

    def check_data(self, datamodule: Any) -> None:
        """Take vocabulary and scores of the data, and build the network.

        Raises:
            UserError: no table of candidates, one that is not as its config says, or one that does not fit the network.
        """
        if not hasattr(datamodule, "prepared"):
            name = getattr(datamodule, "name", type(datamodule).__name__)
            raise UserError(f"module=predictor needs a table of candidates, which data={name} is not")
        self._data, pool = datamodule.prepared, datamodule.prepared.pool
        self._pretrain_steps, self._facts = datamodule.pretrain_steps, datamodule.facts
        if self.network is None:
            with in_config("module"):
                self.network = ExpertEnsemble(self.settings, pool.vocabulary, max(1, len(pool.names)))
            self.names = pool.names
        elif (self.network.vocabulary, self.names) != (pool.vocabulary, pool.names):
            raise UserError(
                f"the predictor is of {len(self.network.vocabulary)} tokens and the scores {', '.join(self.names)}, "
                f"the data of {len(pool.vocabulary)} and {', '.join(pool.names)}: set data.low_fidelity as in training"
            )
        if self.categories is not None:
            _check_categories(self.categories, pool.categories)
        self.categories = pool.categories

    @property
    def net(self) -> ExpertEnsemble:
        """The network; UserError before the data is known."""
        if self.network is None:
            raise UserError("the vocabulary is not known: call check_data with the datamodule first")
        return self.network

    @property
    def finetuned(self) -> bool:
        """Whether labels have touched the experts: the second step has begun."""
        return self._finetuning

    def setup(self, stage: str) -> None:
        """UserError where the trainer would round scores to 16 bits: close ones would come to be equal."""
        if self.trainer.precision in ("16-true", "bf16-true"):
            raise UserError(
                f"trainer.precision = {self.trainer.precision} rounds the scores of the table, of which close ones "
                "become equal: use 32-true or a mixed precision"
            )

    def on_fit_start(self) -> None:
        """UserError where a regression would be on experts that labels trained; a warning where a fusion never is."""
        steps = self.trainer.max_steps
        if self.head == FUSION and 0 < steps <= self._pretrain_steps:
            rank_zero_warn(
                f"trainer.max_steps = {steps} ends before a true score trains anything: experts, which method=dele "
                f"takes, are saved with an untrained gate; for DELE by itself more than data.pretrain_steps = "
                f"{self._pretrain_steps} are needed"
            )
        if self.head != FUSION and steps != self._pretrain_steps:
            raise UserError(
                f"module.head = {self.head} leaves the experts as data.pretrain_steps = {self._pretrain_steps} made "
                f"them: set trainer.max_steps to the same, not to {steps}"
            )

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if batch["finetune"] and not self._finetuning:
            self._finetuning = True
            self.net.reset_gate()
            # randomness is each rank's own: the gate of the first counts
            gate = self.trainer.strategy.broadcast(self.net.gate.state_dict())
            self.net.gate.load_state_dict(gate)
            if self.trainer.is_global_zero:
                for doubt in expert_doubts(self.net, self.names, *self._measured()):
                    warnings.warn(doubt, stacklevel=2)
            if not self.keep_optimizer_state:
                for optimizer in self.trainer.optimizers:
                    optimizer.state.clear()

    def training_step(self, batch: Mapping[str, Any], batch_index: int = 0) -> Tensor:
        tokens = batch["tokens"]
        if batch["finetune"]:
            loss = self.net.fusion_loss(tokens, batch["target"])
        else:
            loss = self.net.expert_losses(tokens, batch["low_fidelity"]).sum()
            # DDP wants a gradient for every parameter; this one is 0
            loss = loss + 0 * torch.stack([each.sum() for each in self.net.gate.parameters()]).sum()
        step = "finetune" if batch["finetune"] else "pretrain"
        self.log(f"train/{step}_loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    def trained(self) -> TrainedExperts:
        """The network as it is now, its scale on the pool, and what was measured; UserError before `check_data`."""
        network, data = self.net, self._data
        if data is None:
            raise UserError("the pool is not known: call check_data with the datamodule first")
        scale = ScoreScale.of(network, data.pool.tokens)
        return TrainedExperts(network, scale, self.names, self.head, *self._measured(), data.pool.categories)

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Tokens and true scores of the labelled candidates."""
        return self._data.pool.tokens[self._data.labelled], self._data.targets[self._data.labelled]

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self._fitted = self.trained().fitted()

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> None:
        assert self._fitted is not None
        mean, _ = self._fitted.predict(batch["tokens"])
        self.metrics.update(mean.to(batch["target"].device), batch["target"])

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            # computed over all ranks already: equal everywhere
            self.log_dict({f"val/{name}": value for name, value in self.metrics.compute().items()})

    def predict_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> dict[str, Tensor]:
        """Mean and deviation of each candidate [B]; "low_fidelity" is not needed."""
        fitted = self._fitted or self.trained().fitted()
        mean, deviation = fitted.predict(batch["tokens"])
        return {"mean": mean, "std": deviation}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SAVED] = {
            "description": describe(self.net, self.names),
            "finetuning": self._finetuning,
            "pretrain_steps": self._pretrain_steps,
            "categories": [list(names) for names in self.categories or ()],
            "facts": self._facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over shape and step; UserError if the checkpoint is of no predictor, or of another."""
        if SAVED not in checkpoint:
            raise UserError("the checkpoint is not of a predictor (module=predictor)")
        saved = checkpoint[SAVED]
        if self.network is None:
            self.network, self.names = rebuild(saved["description"])
        elif saved["description"] != describe(self.network, self.names):
            raise UserError("the checkpoint is of a predictor with other experts, tokens or widths than the config")
        if "categories" in saved:
            if self.categories is not None:
                _check_categories(categories_of(saved), self.categories)
            self.categories = categories_of(saved)
        self._finetuning, self.pretrained_steps = bool(saved["finetuning"]), saved.get("pretrain_steps")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write predictor.safetensors and predictor.json, which `genlight.predictors.predictor_file` reads."""
        save_predictor(folder, self.trained(), self._facts)

    @staticmethod
    def from_pretrained(folder: str | Path) -> TrainedExperts:
        """What `save_pretrained` wrote, to predict with; see `load_predictor` for errors."""
        return load_predictor(folder)


def _check_categories(trained: Categories, data: Categories) -> None:
    """UserError where the data has other categories than the training had: it numbers the same text differently."""
    for place, pair in enumerate(zip_longest(trained, data, fillvalue=())):
        if pair[0] != pair[1]:
            before, now = (", ".join(names) or "numbers" for names in pair)
            raise UserError(f"the categories of token {place} were {before} in training, and are {now} in the data")
