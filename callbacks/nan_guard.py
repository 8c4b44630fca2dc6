"""Stop at the first loss that is not finite, before it reaches the weights."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from genlight.errors import UserError


class NanGuard(Callback):
    """Raise a `UserError` that names the step when a training loss is nan or infinite.

    The check runs before the backward pass, so neither the weights nor any checkpoint see the value. On several ranks
    all stop together.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        is_bad = not bool(torch.isfinite(loss.detach()).all())
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce_boolean_decision(is_bad, all=False)
        if is_bad:
            raise UserError(_message(trainer, loss))


def _message(trainer: Trainer, loss: torch.Tensor) -> str:
    saved = [
        path for callback in trainer.checkpoint_callbacks if (path := getattr(callback, "_last_checkpoint_saved", ""))
    ]
    kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
    batch = trainer.fit_loop.epoch_loop.batch_idx
    return (
        f"the loss is {loss.detach().float().mean().item()} at step {trainer.global_step} "
        f"(epoch {trainer.current_epoch}, batch {batch}): stopped before the weights changed; {kept}. "
        "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or use trainer.precision=32-true"
    )
