"""What data modules share whose batches have an order of their own: their place, and what a resumed run needs."""

import logging
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from genlight.errors import UserError

log = logging.getLogger(__name__)


class SeededDataModule(LightningDataModule):
    """Base of data modules with an order of their own.

    Attributes:
        name: of the data, for messages.
        seed: of the training order.
        batch_size: of one device.
    """

    name: str
    seed: int
    batch_size: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of all that the data depends on."""
        raise NotImplementedError

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share with this one: the data, and the keys that set the order of batches."""
        order = {"seed": self.seed, "batch_size": self.batch_size, "world_size": self._place()[1]}
        return {"fingerprint": self.fingerprint, "order": order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares a checkpoint's data with this one when training goes on from it.

        Raises:
            UserError: the checkpoint was trained on other data.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        mine = self.state_dict()
        theirs = str(state_dict.get("fingerprint"))
        if theirs != mine["fingerprint"]:
            raise UserError(
                f"the checkpoint was trained on other data: fingerprint {theirs[:12]}, "
                f"{self.name} as configured has {mine['fingerprint'][:12]}; resume with the same data.* keys and files"
            )
        for key, value in mine["order"].items():
            if (saved := state_dict.get("order", {}).get(key)) != value:
                log.warning("resuming with %s=%s instead of %s: the order of batches changes", key, value, saved)
