"""Training of autoregressive image networks over the tokens of a frozen tokenizer."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional

from genlight.diffusion.flow_codes import Method, flow_choice
from genlight.errors import in_config
from genlight.modules.data_check import check_classes, check_images, check_precision
from genlight.modules.described import DescribedWeights
from genlight.modules.generation import GeneratorValidation
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.token_folder import (
    SavedTokenizer,
    TokenTeacher,
    Transformer,
    model_of,
    read_tokenizer,
    save_token_teacher,
)
from genlight.nets.autoregressive import SamplingSettings, decode
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.var import VAR, VARTransformer
from genlight.recipes import fit_below_where_missing

# images over which the likelihood is measured in a validation, at most
LIKELIHOOD_IMAGES = 1000
# a search and a choice have images of their own, apart from those of the report
_HALVES = {"search": 0, "select": 1}


class AutoregressiveModule(GeneratorValidation, DescribedWeights, Optimization, LightningModule):
    """Cross-entropy of every token given the class and the groups of tokens before its own (LlamaGen, VAR).

    A sample is a function of its noise: each token is where the flow of Distilled Decoding carries the token's own
    noise vector (`genlight.diffusion.flow_codes`), which draws from the network's distribution.

    The tokenizer is no submodule: it is neither trained nor part of the checkpoint. The saved folder has a copy.

    Args:
        network: LlamaGenTransformer or VARTransformer, class-conditional.
        tokenizer: folder of a tokenizer, or the run folder of its fit; read when it is needed.
        tokenizer_recipe: the experiment whose fit makes the folder ``tokenizer`` where it is missing, see `prepare`.
        sampling: guidance, temperature and filters of samples, saved with the network; None is plain sampling.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        label_dropout: probability of training on the null class, which guidance needs.
        flow_steps, flow_method: of the flow, see `genlight.diffusion.flow_codes.final_log_weights`.

    Raises:
        ValueError, TypeError: arguments that do not fit each other, naming the config key.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: str,
        *,
        tokenizer_recipe: str | None = None,
        sampling: SamplingSettings | None = None,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        label_dropout: float = 0.1,
        flow_steps: int = 32,
        flow_method: Method = "2m",
    ) -> None:
        super().__init__()
        if not isinstance(network, LlamaGenTransformer | VARTransformer):
            raise TypeError(
                f"module.network is a {type(network).__name__}; expected LlamaGenTransformer or VARTransformer"
            )
        if network.config.get("text_dim") is not None:
            raise ValueError("module.network.text_dim must be null: the network learns classes")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"module.label_dropout = {label_dropout} must be in [0, 1)")
        self.settings = sampling or SamplingSettings()
        if self.settings.top_k > network.config["num_codes"]:
            raise ValueError(
                f"module.sampling.top_k = {self.settings.top_k} must be at most {network.config['num_codes']}, "
                "module.network.num_codes"
            )
        if self.settings.guidance_scale > 1 and label_dropout == 0:
            raise ValueError("module.sampling.guidance_scale above 1 needs module.label_dropout above 0")
        if flow_steps < 1:
            raise ValueError(f"module.flow_steps = {flow_steps} must be at least 1")
        self.network: Transformer = network
        self.tokenizer_source, self.tokenizer_recipe = tokenizer, tokenizer_recipe
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.label_dropout = float(label_dropout)
        self.flow_steps, self.flow_method = int(flow_steps), flow_method
        self._tokenizer: SavedTokenizer | None = None
        self._datamodule: weakref.ref[Any] | None = None
        self._likelihood: float | None = None

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the tokenizer by ``tokenizer_recipe`` below ``run_root`` if its folder is missing.

        Raises:
            UserError: the folder is not what the fit makes, or the fit failed.
        """
        if self.tokenizer_recipe is not None:
            fit_below_where_missing(self.tokenizer_recipe, self.tokenizer_source, "module.tokenizer", run_root, cache)

    @property
    def tokenizer(self) -> SavedTokenizer:
        """The frozen tokenizer on the module's device, read if need be.

        Raises:
            UserError: it cannot be read, or does not fit the network.
        """
        if self._tokenizer is None:
            saved = read_tokenizer(self.tokenizer_source)
            with in_config("module"):
                found = sum(model_of(self.network, saved.network).group_sizes)
                if found != saved.num_tokens:
                    raise ValueError(f"network decides {found} tokens, an image has {saved.num_tokens}")
            self._tokenizer = saved
        self._tokenizer.network.to(self.device)
        return self._tokenizer

    @property
    def model(self) -> LlamaGen | VAR:
        """Network and codebook as samplers want them."""
        return model_of(self.network, self.tokenizer.network)

    @property
    def sample_shape(self) -> tuple[int, int]:
        """(N, C) of the noise of one sample: a vector in the space of the codes for each token."""
        saved = self.tokenizer
        return saved.num_tokens, saved.network.quantizer.code_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.tokenizer.image_shape

    def setup(self, stage: str) -> None:
        """UserError where the trainer would hold images and noise in other numbers than the frozen tokenizer does."""
        check_precision(self.trainer, "what the tokenizer reads and the noise that decides tokens")

    def check_data(self, datamodule: Any) -> None:
        """UserError naming both config keys and values if the data does not fit tokenizer or network."""
        check_images(datamodule, self.image_shape, "module.tokenizer channels", "module.tokenizer image size")
        check_classes(datamodule, self.network.num_classes, "module.network.num_classes")
        # a search validates with batches alone; an averaged copy of the module must not copy the images
        self._datamodule = weakref.ref(datamodule)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        label = batch["label"]
        dropped = (torch.rand(len(label)) < self.label_dropout).to(label.device)
        tokens = self.tokenizer.network.encode(batch["image"])
        loss = self.negative_log_likelihood(tokens, torch.where(dropped, self.network.num_classes, label))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(label))
        return loss

    def negative_log_likelihood(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Mean over all tokens [B, N] given labels [B], in nats per token, of the plain network: a scalar."""
        logits = self.model.logits(tokens, label)
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def sample_tokens(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """Tokens [B, N] of noise [B, N, C] and labels [B]; the network runs in eval mode.

        Raises:
            ValueError: no labels, or noise of another shape.
        """
        if label is None:
            raise ValueError("sampling a class-conditional module needs labels")
        model, training = self.model, self.network.training
        choose = flow_choice(noise, model.codebook, model.group_sizes, steps=self.flow_steps, method=self.flow_method)
        self.network.eval()
        try:
            return decode(model, label, self.settings, choose)
        finally:
            self.network.train(training)

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from unit noise [B, *sample_shape] and labels [B]."""
        return self.tokenizer.network.decode(self.sample_tokens(noise, label))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        # now: at the end of the epoch averaged weights, those of samples and artifact, have gone again
        self._likelihood = None
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None and self._datamodule is not None:
            datamodule = self._datamodule()
        if datamodule is not None and not self.trainer.sanity_checking:
            # a fit has no search whose images are to be kept from it
            fits = self.trainer.state.fn == TrainerFn.FITTING
            self._likelihood = self.held_out_likelihood(datamodule, "report" if fits else datamodule.draw)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._likelihood is not None:
            self.log("val/nll", self._likelihood)

    @torch.no_grad()
    def held_out_likelihood(self, datamodule: Any, draw: str = "report") -> float:
        """Nats per token of the first images of a draw, at most `LIKELIHOOD_IMAGES` and the batch that reaches them.

        The draw "report" has those of "test", "search" and "select" every other one of "train".
        """
        half = _HALVES.get(draw)
        total, count, seen = 0.0, 0, 0
        for batch in datamodule.reference_loader("test" if half is None else "train"):
            if count >= LIKELIHOOD_IMAGES:
                break
            images, label = batch["image"], batch["label"]
            if half is not None:
                rows = slice((half - seen) % 2, None, 2)
                seen += len(images)
                images, label = images[rows], label[rows]
            if len(images):
                images, label = images.to(self.device), label.to(self.device)
                tokens = self.tokenizer.network.encode(images)
                total += float(self.negative_log_likelihood(tokens, label)) * len(images)
                count += len(images)
        return total / count

    def description(self) -> dict[str, Any]:
        """What the weights mean, as plain values: architecture of the network, and the tokenizer with its weights."""
        config = json.loads(json.dumps(self.network.config))
        network = {"class": type(self.network).__name__, "config": config}
        return {"network": network, "tokenizer": self.tokenizer.fingerprint}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def teacher(self) -> TokenTeacher:
        """The network as it is now, with all that sampling needs."""
        saved = self.tokenizer
        return TokenTeacher(self.model, saved.network, self.settings, saved.image_shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that `genlight.modules.token_folder.read_token_teacher` reads."""
        save_token_teacher(folder, self.teacher())
