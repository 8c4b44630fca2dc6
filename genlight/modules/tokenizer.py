"""Training of the tokenizers that autoregressive networks decide the tokens of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional

from genlight.errors import UserError
from genlight.modules.data_check import check_images, check_precision
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.token_folder import SavedTokenizer, save_tokenizer
from genlight.nets.vq_tokenizer import VQTokenizer


class TokenizerModule(Optimization, LightningModule):
    """Squared error of the reconstruction plus the loss of the quantiser (van den Oord et al. 2017, equation 3).

    A code that was not used for a while is dead: no gradient reaches it again. Every `restart_every` batches the dead
    ones move to vectors of the batch at hand (Dhariwal et al. 2020, arXiv 2005.00341, section 3.1), drawn from torch's
    global generator. What was used is part of the weights, so that a resumed run does the same.

    It is validated on images: set ``data.evaluation=classification``.

    Args:
        network: VQTokenizer with the quantiser of LlamaGen (one scale) or of VAR (several).
        image_size: height and width of the images.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        quantizer_weight: of the quantiser's loss beside the squared error.
        restart_every: batches between two restarts of dead codes; 0 is never.

    Raises:
        ValueError: an argument is out of range, or an image size that the tokenizer cannot use.
    """

    usage: Tensor
    batches_since_restart: Tensor

    def __init__(
        self,
        network: VQTokenizer,
        image_size: int,
        *,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        quantizer_weight: float = 1.0,
        restart_every: int = 50,
    ) -> None:
        super().__init__()
        if quantizer_weight < 0:
            raise ValueError(f"module.quantizer_weight = {quantizer_weight} must not be negative")
        if restart_every < 0:
            raise ValueError(f"module.restart_every = {restart_every} must not be negative")
        grid, rest = divmod(image_size, network.downsampling)
        scales = network.quantizer.config.get("scales", [grid])
        if rest or grid != scales[-1]:
            raise ValueError(
                f"module.image_size = {image_size} must be {network.downsampling} (what module.network.channels "
                f"divide by) times {'a whole number' if rest else f'the last of the scales {scales}'}"
            )
        self.network = network
        self.image_shape = (int(network.config["image_channels"]), image_size, image_size)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.quantizer_weight, self.restart_every = float(quantizer_weight), int(restart_every)
        # floats, because averaging of weights takes these for weights too
        self.register_buffer("usage", torch.zeros(network.quantizer.num_codes))
        self.register_buffer("batches_since_restart", torch.zeros(()))
        self._counts = torch.zeros(0)
        self._error = [0.0, 0.0]

    def check_data(self, datamodule: Any) -> None:
        """UserError naming both config keys and values if the data does not fit the tokenizer."""
        check_images(datamodule, self.image_shape, "module.network.image_channels", "module.image_size")
        if getattr(datamodule, "evaluation", None) != "classification":
            raise UserError("a tokenizer is validated on images: set data.evaluation=classification")

    def setup(self, stage: str) -> None:
        """UserError where the trainer would hold features in other numbers than those that choose codes."""
        check_precision(self.trainer, "the features that choose codes")

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        if 0 < self.restart_every <= int(self.batches_since_restart):
            self.restart_dead_codes(batch["image"])
            self.usage.zero_()
            self.batches_since_restart.zero_()

    @torch.no_grad()
    def restart_dead_codes(self, images: Tensor) -> int:
        """Move unused codes to vectors of images [B, C, H, W], drawn without repetition; returns how many moved."""
        dead = (self.usage == 0).nonzero().flatten()
        vectors = self.network.quantize(images).vectors.flatten(0, 1)
        chosen = torch.randperm(len(vectors))[: len(dead)].to(vectors.device)
        # all processes must move the same codes to the same places
        moved: Tensor = self.trainer.strategy.broadcast(vectors[chosen])
        weight = self.network.quantizer.embedding.weight
        weight[dead[: len(moved)]] = moved.to(weight)
        return len(moved)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        images = batch["image"]
        quantized = self.network.quantize(images)
        error = functional.mse_loss(self.network.decode_features(quantized.features), images)
        loss = error + self.quantizer_weight * quantized.loss
        counts = torch.bincount(quantized.tokens.flatten(), minlength=len(self.usage)).to(self.usage)
        self.usage += self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.batches_since_restart += 1
        size = len(images)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/reconstruction", error, batch_size=size)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._counts = torch.zeros_like(self.usage)
        self._error = [0.0, 0.0]

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> None:
        images = batch["image"]
        tokens = self.network.encode(images)
        self._counts += torch.bincount(tokens.flatten(), minlength=len(self._counts)).to(self._counts)
        self._error[0] += float((self.network.decode(tokens) - images).square().sum())
        self._error[1] += images.numel()

    def on_validation_epoch_end(self) -> None:
        totals = torch.cat((self._counts, self._counts.new_tensor(self._error)))
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        counts, (error, numbers) = totals[:-2], totals[-2:].tolist()
        values = {"reconstruction": error / numbers, **code_usage(counts)}
        self.log_dict({f"val/{name}": value for name, value in values.items()})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.safetensors and tokenizer.json, see `genlight.modules.token_folder.read_tokenizer`."""
        save_tokenizer(folder, SavedTokenizer(self.network, self.image_shape))


def code_usage(counts: Tensor) -> dict[str, float]:
    """How evenly codes are used, from counts [V].

    Returns:
        usage: share of the codes that are used at all; perplexity: exp of the entropy, between 1 and V.
    """
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
