"""A zoo of diffusion models as one generator, whose members take turns as a search says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from genlight.errors import UserError
from genlight.io import resolve_below
from genlight.modules.diffusion import DiffusionModule, SchedulerChoice
from genlight.modules.exported_pipeline import Network, guided_prediction
from genlight.modules.networks import plain_config, prepare_network
from genlight.modules.pretrained import NETWORK_CLASSES
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.modules.searched_sampling import Denoiser
from genlight.modules.zoo import Zoo, ZooEntry, load_zoo, source_folder
from genlight.recipes import fit_run_where_missing


class ZooModule(DiffusionModule):
    """Several diffusion models of one task, measured and searched as one generator, never trained.

    It samples with the primary member by its own scheduler, until a sampler and the members of its evaluations are set
    (`set_sampler`, `set_members`). Noise schedule, classes and autoencoder are those of all members.

    Args:
        members: by name, where each is: a source alone (the folder of a genlight fit, a diffusers pipeline folder or a
            hub id), or a mapping of the fields of `ZooEntry`. Read in ``configure_model``.
        primary: the member that samples where none is set, and whose prediction type all outputs have; None: the one
            with most parameters.
        recipe: how members whose folder is missing are made, see `prepare`: ``experiment``, whose fit makes one, and
            ``overrides``, by name of the member the words of its command.
        resident: so many members at most stay on the device. None: all.
        scheduler: the diffusers scheduler to sample with. None: that of the primary's folder.
        num_inference_steps: steps of that scheduler. None: as the primary was saved with, else 50.
        guidance_scale: classifier-free guidance; 1 samples the plain conditional model at half the cost. None: as the
            primary was saved with, else 1.
        class_conditional: give the networks the label. None: yes if they have classes.
        num_classes: classes of the data. None: those of the networks.

    Raises:
        ValueError: arguments that do not fit each other, naming the config key.
    """

    def __init__(
        self,
        members: Mapping[str, Any],
        primary: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        resident: int | None = None,
        scheduler: SchedulerChoice | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = 1.0,
        class_conditional: bool | None = None,
        num_classes: int | None = None,
    ) -> None:
        if not members:
            raise ValueError("module.members is empty: a zoo needs one member or more")
        if primary is not None and primary not in members:
            raise ValueError(f"module.primary = {primary!r} is not in module.members: {', '.join(members)}")
        if resident is not None and resident < 1:
            raise ValueError(f"module.resident = {resident} must be 1 or more")
        super().__init__(
            None,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            class_conditional=class_conditional,
            num_classes=num_classes,
            label_dropout=0.0,
        )
        self.entries = dict(members)
        self.pretrained = _sources(self.entries)
        self.recipe = _checked_recipe(recipe, self.entries)
        self.primary, self.resident = primary, resident
        self.zoo: Zoo | None = None
        self.scheduled: ScheduledDenoiser | None = None

    def _require(self, key: str, value: Any) -> None:
        """The folders decide what is null."""

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the members that ``recipe.overrides`` names and whose folders are missing, each by a command of its own.

        The source of such a member is the folder of its fit, ``<run.root>/<run.name>/fit``: the command is given both.

        Raises:
            UserError: a fit failed or left no such folder, or the source is no folder of a fit.
        """
        overrides: Mapping[str, Sequence[str]] = self.recipe.get("overrides", {})
        for name in self.entries:
            if name in overrides:
                source = ZooEntry.of(name, self.entries[name]).source
                fit_run_where_missing(
                    self.recipe["experiment"], source, f"module.members.{name}", cache, overrides[name]
                )

    def configure_model(self) -> None:
        """Read the members, once; called by Lightning and by whatever needs a network."""
        if self.zoo is None:
            zoo = load_zoo(self.entries, NETWORK_CLASSES)
            primary = zoo.largest if self.primary is None else self.primary
            try:
                self.zoo, self.primary = self._taken(zoo, primary), primary
            except BaseException:
                self.network = None
                raise

    def load_pretrained(self, source: str | Path) -> None:
        """UserError: what the members are is said by `members`."""
        raise UserError(f"{source}: the members of a zoo are set by module.members; leave ckpt_path null")

    def _taken(self, zoo: Zoo, primary: str) -> Zoo:
        """The zoo, with the primary as its pipeline folder gives it to this module, and all others prepared like it."""
        member = zoo.members[primary]
        assert member.entry is not None
        super().load_pretrained(source_folder(primary, member.entry))
        self.pretrained = _sources(self.entries)
        network = self.net.requires_grad_(False)
        if network.dtype != member.network.dtype:  # a quantized network refuses to be cast, even to its own type
            network = network.to(member.network.dtype)
        zoo = Zoo({**zoo.members, primary: replace(member, network=network)})
        classes = self.num_classes if self.class_conditional else None
        for name, network in zoo.networks.items():
            try:
                prepare_network(network, classes)
            except (TypeError, ValueError) as error:
                raise UserError(f"members.{name}: {error}") from error
        zoo.noise_schedule  # noqa: B018 - raises where no folder says it
        self.scheduled = ScheduledDenoiser(zoo.networks, primary, zoo.predictions, self.resident).eval()
        return zoo

    @property
    def members(self) -> dict[str, Network]:
        """The networks by name, in the order of the configuration."""
        self.net  # noqa: B018 - may still have to be read
        assert self.zoo is not None
        return self.zoo.networks

    def set_members(self, timesteps: Sequence[float], names: Sequence[str]) -> None:
        """Let names[i] answer at timesteps[i], as the networks see them, under a set sampler; (): the primary always.

        Raises ValueError as `ScheduledDenoiser.set_schedule` does.
        """
        self._scheduled.set_schedule(timesteps, names)

    def denoiser(self, guidance_scale: float | None = None) -> Denoiser:
        """model(x, timestep, label=None): the guided networks by turns, float32 [B, C, H, W], in evaluation mode.

        Args:
            guidance_scale: instead of the module's.
        """
        network = self._scheduled.eval()
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        self.check_guidance(scale)

        def model(x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
            return guided_prediction(network, self._style, x, timestep, label, scale, self.num_classes)

        return model

    @property
    def _scheduled(self) -> ScheduledDenoiser:
        self.net  # noqa: B018 - may still have to be read
        assert self.scheduled is not None
        return self.scheduled

    def configure_optimizers(self) -> Any:
        """UserError: members are trained by experiments of their own."""
        raise UserError(
            "module=zoo is measured and searched as it is: use validate; its members are trained by experiments of "
            "their own"
        )

    def training_step(self, *_: Any) -> Any:
        """UserError: members are trained by experiments of their own."""
        self.configure_optimizers()

    def description(self) -> dict[str, Any]:
        """What the weights mean: that of the primary, and of each member its network and prediction type, in order."""
        common = super().description()
        assert self.zoo is not None
        members = [
            {
                "name": name,
                "class": type(network).__name__,
                "config": plain_config(network),
                "prediction_type": self.zoo.predictions[name].prediction_type,
            }
            for name, network in self.zoo.networks.items()
        ]
        return {**common, "primary": self.primary, "members": members}

    def fingerprint(self, state: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over the description and the weights of all members, which are read once."""
        if state is not None:
            return super().fingerprint(state)
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode())
        assert self.zoo is not None
        for member in self.zoo.members.values():
            digest.update(f"{member.name}/{member.sha256}/".encode())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """The primary as a diffusers pipeline folder; each other member as one, without autoencoder, in its members."""
        super().save_pretrained(folder)
        assert self.zoo is not None
        for name, network in self.members.items():
            if name != self.primary:
                prediction = self.zoo.predictions[name]
                alone = DiffusionModule(
                    network,
                    prediction.schedule,
                    prediction.prediction_type,
                    class_conditional=self.class_conditional,
                    num_classes=self.num_classes,
                    label_dropout=0.0,
                    scheduler=self.scheduler,
                    num_inference_steps=self.num_inference_steps,
                    guidance_scale=self.guidance_scale,
                )
                alone.save_pretrained(resolve_below(Path(folder) / "members", name))


def _sources(entries: Mapping[str, Any]) -> str:
    """In words, where the weights are from."""
    return ", ".join(ZooEntry.of(name, value).source for name, value in entries.items())


def _checked_recipe(recipe: Mapping[str, Any] | None, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, {} for None; ValueError for other keys, or members that there are not."""
    if not recipe:
        return {}
    if set(recipe) != {"experiment", "overrides"} or not isinstance(recipe["overrides"], Mapping):
        raise ValueError("module.recipe needs experiment, and overrides by name of the member")
    for name, words in recipe["overrides"].items():
        if name not in entries:
            raise ValueError(f"module.recipe.overrides.{name} is not in module.members: {', '.join(entries)}")
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"module.recipe.overrides.{name} = {words!r} must be a list of words of a command")
    return recipe
