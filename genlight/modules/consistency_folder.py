"""Reading diffusers folders of consistency models, such as openai/diffusers-cd_imagenet64_l2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlight.diffusion.noise_schedules import EDMSchedule
from genlight.errors import UserError
from genlight.modules.exported_pipeline import Network
from genlight.modules.latents import FrozenVAE
from genlight.modules.networks import differences, first_of, label_rows, plain_config, prepare_network
from genlight.modules.pretrained import (
    CONSISTENCY,
    NETWORK_CLASSES,
    RECORD,
    class_name_of,
    component_folder,
    load_component,
    load_vae,
    local_folder,
    read_object,
)

SCHEDULER = CONSISTENCY


@dataclass(frozen=True)
class ConsistencyFolder:
    """What the folder of a consistency model holds; ``num_classes`` is None without classes."""

    source: str
    network: Network
    vae: Network | None
    scheduler: Mapping[str, Any]
    num_classes: int | None
    class_names: list[str] | None

    def apply_to(self, module: Any) -> None:
        """Give a ConsistencyModule what it lacks; UserError naming the first keys in which the two disagree."""
        if module.class_conditional is None or (module.class_conditional and module.num_classes is None):
            module.class_conditional, module.num_classes = self.num_classes is not None, self.num_classes
        configured = module.num_classes if module.class_conditional else None
        if configured != self.num_classes:
            raise UserError(f"module.num_classes = {configured}, but {self.source} has {self.num_classes} classes")
        try:
            network = prepare_network(self.network, self.num_classes)
            schedule = EDMSchedule(*(float(self.scheduler[key]) for key in ("sigma_min", "sigma_max", "sigma_data")))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.source}: {error}") from error
        if module.network is None:
            module.network = network
        else:
            one, two = ({"class": type(n).__name__, **plain_config(n)} for n in (network, module.network))
            if different := differences(one, two):
                raise UserError(f"the network of {self.source} is not the module's: {first_of(different)}")
            module.network.load_state_dict(network.state_dict())
        if self.vae is not None:
            module.vae, module.vae_source = FrozenVAE(self.vae), None
        module.noise_schedule = schedule
        module.rho = float(self.scheduler.get("rho", module.rho))
        module.num_train_timesteps = int(self.scheduler.get("num_train_timesteps", module.num_train_timesteps))
        module.class_names = self.class_names or module.class_names


def read_consistency(source: str | Path) -> ConsistencyFolder:
    """Read a pipeline folder, or a hub id, whose scheduler is a CMStochasticIterativeScheduler.

    Raises:
        UserError: not found, not a consistency model of the kinds known here, or damaged.
    """
    folder = local_folder(source)
    index = read_object(folder / "model_index.json")
    config = read_object(component_folder(folder, "scheduler") / "scheduler_config.json")
    if config.get("_class_name") != SCHEDULER:
        raise UserError(
            f"{source} is no consistency model: its scheduler is a {config.get('_class_name')}, not a {SCHEDULER}; "
            "a diffusion model can be the module.teacher of one"
        )
    key = "unet" if class_name_of(index, "unet") else "transformer"
    network = load_component(folder, index, key, NETWORK_CLASSES)
    vae = load_vae(folder, index)
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    num_classes = record["num_classes"] if "num_classes" in record else _classes(network)
    return ConsistencyFolder(str(source), network, vae, config, num_classes, record.get("class_names"))


def _classes(network: Network) -> int | None:
    """Classes of a network of unknown origin: all rows of its table, but a DiT's null class."""
    rows = label_rows(network)
    return rows - 1 if rows is not None and "Transformer" in type(network).__name__ else rows
