"""A zoo: several denoisers of one task, read from folders or the hub, checked against each other.

Members are known by their names, in the order of the configuration; nothing depends on the order of files on disk.
Only the denoising network of a member is read, and what its folder says of noise schedule, prediction type, autoencoder
and classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import SEARCHED, read_scheduler
from genlight.errors import UserError
from genlight.io import resolve_below, verify_if_described
from genlight.modules.artifact_kind import told_kind
from genlight.modules.exported_pipeline import Network
from genlight.modules.pipeline_calls import DTYPES, weights_digest
from genlight.modules.pretrained import (
    RECORD,
    class_name_of,
    component_folder,
    downloaded,
    first_line,
    load_network,
    read_object,
    read_scheduler_config,
    stored_dtype,
)
from genlight.modules.scheduled_denoiser import largest
from genlight.reports.origin import HUB_ID

# keys under which pipelines have their denoising network, in the order in which they are looked for
COMPONENTS = ("transformer", "unet", "prior")


@dataclass(frozen=True)
class ZooEntry:
    """Where one member is.

    Args:
        source: the folder of a genlight fit, a diffusers folder (of a pipeline or of the network alone), or a hub id.
        subfolder: folder of the network in it; None: that of the component.
        dtype: type of the weights: "float32", "float16", "bfloat16", or "auto", that in which they are stored.
        variant: ending of the names of weight files, such as "fp16".
        component: key of the network in model_index.json, such as "transformer_2". None: transformer, unet or prior.

    Raises ValueError that names the field.
    """

    source: str
    subfolder: str | None = None
    dtype: str = "auto"
    variant: str | None = None
    component: str | None = None

    def __post_init__(self) -> None:
        if not self.source or not isinstance(self.source, str):
            raise ValueError(f"source = {self.source!r} must be a folder or a hub id")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype = {self.dtype!r} must be auto, {', '.join(DTYPES)}")

    @staticmethod
    def of(name: str, value: ZooEntry | Mapping[str, Any] | str) -> ZooEntry:
        """The entry that a configuration states: a source alone, or a mapping of the fields.

        Raises:
            UserError: a field that there is not, or a value that does not fit.
        """
        if isinstance(value, ZooEntry):
            return value
        stated = {"source": value} if isinstance(value, str) else dict(value)
        known = [field.name for field in fields(ZooEntry)]
        for key in stated:
            if key not in known:
                raise UserError(f"members.{name}.{key}: there is no such field; known are {', '.join(known)}")
        try:
            return ZooEntry(**{"source": "", **stated})
        except ValueError as error:
            raise UserError(f"members.{name}: {error}") from error


@dataclass(frozen=True, eq=False)
class Member:
    """One denoiser with what its folder says of it.

    Attributes:
        folder: of the network; None for one that was not read from a folder.
        root: folder of the pipeline that it is part of, or `folder`.
        prediction: prediction type and noise schedule; None if no scheduler lies beside the network.
        vae: config of the autoencoder; None without one.
        num_classes: classes of the data; None without.
    """

    name: str
    network: Network
    entry: ZooEntry | None = None
    folder: Path | None = None
    root: Path | None = None
    prediction: Prediction | None = None
    vae: Mapping[str, Any] | None = None
    num_classes: int | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the names, types and values of the weights."""
        return weights_digest(self.network)


@dataclass(frozen=True, eq=False)
class Zoo:
    """Members by name; all share noise, conditions, noise schedule and autoencoder."""

    members: Mapping[str, Member]

    @property
    def networks(self) -> dict[str, Network]:
        """The networks by name."""
        return {name: member.network for name, member in self.members.items()}

    @property
    def predictions(self) -> dict[str, Prediction]:
        """What each member predicts; one whose folder does not say so predicts as the first that says it."""
        known = next((m.prediction for m in self.members.values() if m.prediction is not None), None)
        found = {name: member.prediction or known for name, member in self.members.items()}
        return {name: prediction for name, prediction in found.items() if prediction is not None}

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of all members.

        Raises:
            UserError: no folder says what it is.
        """
        for prediction in self.predictions.values():
            return prediction.schedule
        raise UserError("members: none has a scheduler beside its network, so that their noise schedule is not known")

    @property
    def largest(self) -> str:
        """The member with most parameters."""
        return largest(self.networks)


def load_zoo(
    entries: Mapping[str, Any] | Sequence[tuple[str, Any]],
    allowed: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    beside: Sequence[Member] = (),
) -> Zoo:
    """Read the members and check that they fit each other.

    Args:
        entries: by name, a `ZooEntry`, a mapping of its fields, or a source alone.
        allowed: class names of diffusers that are expected; None: every denoising network of diffusers.
        dtype: what dtype "auto" stands for; None: as stored.
        beside: members that are there already, before the others.

    Raises:
        UserError: a name that is empty or given twice, a member that cannot be read, or two that do not fit each other,
            see `genlight.modules.zoo_checks`.
    """
    from genlight.modules.zoo_checks import check_compatible, warn_of_same_weights

    pairs = list(entries.items()) if isinstance(entries, Mapping) else list(entries)
    _check_names([*(member.name for member in beside), *(name for name, _ in pairs)])
    members = list(beside)
    for name, value in pairs:
        members.append(_read_member(name, ZooEntry.of(name, value), allowed or denoiser_classes(), dtype))
    check_compatible(members)
    warn_of_same_weights(members)
    return Zoo({member.name: member for member in members})


def source_folder(name: str, entry: ZooEntry) -> Path:
    """The folder of an entry on this machine; of a genlight fit its artifact, of a hub id what was downloaded.

    Raises:
        UserError: there is none, a fit has not finished, or files are damaged.
    """
    folder = Path(entry.source)
    if not folder.exists() and HUB_ID.fullmatch(entry.source):
        return _from_hub(name, entry)
    if (folder / "run.json").is_file():
        folder = folder / "artifact"
        if not folder.is_dir():
            raise UserError(f"members.{name}: {entry.source} is a run without an artifact: its fit has not finished")
    if not folder.is_dir():
        raise UserError(
            f"members.{name}: {entry.source} is not a folder: expected that of a genlight fit, one of diffusers, or a "
            "hub id"
        )
    verify_if_described(folder)
    return folder


def denoiser_classes() -> tuple[str, ...]:
    """Names of all classes of diffusers that denoise: UNets and transformers."""
    import diffusers

    return tuple(name for name in dir(diffusers) if re.search(r"(UNet|UVit|Transformer|DiT)\w*Model$", name))


def _check_names(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"members: the name of a member is {name!r}; each needs one of its own")
        if name in names[:index]:
            raise UserError(f"members.{name} is given twice: each member needs a name of its own")
    if not names:
        raise UserError("members: a zoo needs one member or more")


def _read_member(name: str, entry: ZooEntry, allowed: tuple[str, ...], dtype: torch.dtype | None) -> Member:
    root = source_folder(name, entry)
    index = read_object(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    folder = _network_folder(name, entry, root, index)
    try:
        stored = stored_dtype(sorted(folder.glob("*.safetensors")), entry.variant)
        found = dtype or stored or torch.float32 if entry.dtype == "auto" else DTYPES[entry.dtype]
        options: dict[str, Any] = {"variant": entry.variant} if entry.variant else {}
        class_name = str(read_object(folder / "config.json").get("_class_name"))
        network = load_network(folder, class_name, allowed, dtype=found, **options)
    except UserError as error:
        raise UserError(f"members.{name}: {error}") from error
    network.requires_grad_(False).eval()
    record = read_object(root / RECORD) if (root / RECORD).is_file() else {}
    classes = record["num_classes"] if "num_classes" in record else class_rows(network)
    return Member(name, network, entry, folder, root, _prediction(name, root), _vae_config(root), classes)


def _network_folder(name: str, entry: ZooEntry, root: Path, index: Mapping[str, Any]) -> Path:
    if entry.subfolder:
        folder = resolve_below(root, entry.subfolder)
    else:
        key = entry.component or next((key for key in COMPONENTS if class_name_of(index, key)), None)
        if entry.component and index and not class_name_of(index, entry.component):
            raise UserError(f"members.{name}.component = {entry.component}: model_index.json names none such")
        folder = root if key is None else component_folder(root, key)
    if not (folder / "config.json").is_file():
        raise UserError(f"members.{name}: {folder} holds no config.json of a network{told_kind(folder)}")
    if "_class_name" not in read_object(folder / "config.json"):
        raise UserError(f"members.{name}: {folder} is no network of diffusers{told_kind(folder)}")
    return folder


def class_rows(network: Network) -> int | None:
    """Rows of the class embedding that the config of a network states, a DiT's null class left out; None without."""
    if type(network).__name__ == "DiTTransformer2DModel":
        return int(network.config.num_embeds_ada_norm)
    rows = network.config.get("num_class_embeds")
    return None if rows is None else int(rows)


def _prediction(name: str, root: Path) -> Prediction | None:
    path = root / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    try:
        config = read_scheduler_config(path)
        schedule, kind = read_scheduler(config if config.get("_class_name") == SEARCHED else _with_defaults(config))
        return Prediction(kind, schedule)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"members.{name}: what {path} says of noise schedule and prediction type cannot be used, so outputs of "
            f"this member cannot be turned into another's: {first_line(error)}"
        ) from error


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a scheduler of diffusers, options that it leaves out filled in."""
    import diffusers

    kind: Any = getattr(diffusers, str(config.get("_class_name")))
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{config.get('_class_name')} is no scheduler of diffusers")
    maker: Any = kind
    full: Mapping[str, Any] = maker.from_config(dict(config)).config
    return {**full, "_class_name": config["_class_name"]}


def _vae_config(root: Path) -> Mapping[str, Any] | None:
    for key in ("vae", "vqvae"):
        if (root / key / "config.json").is_file():
            return read_object(root / key / "config.json")
    return None


def _from_hub(name: str, entry: ZooEntry) -> Path:
    """The network's part of a hub's repository, in the cache of huggingface_hub."""
    keys = [key for key in (entry.subfolder, entry.component) if key] or list(COMPONENTS)
    ending = f"*.{entry.variant}*.safetensors" if entry.variant else "*.safetensors"
    patterns = ["README.md", "model_index.json", RECORD, "config.json"]
    patterns += ["scheduler/*.json", "vae/config.json", "vqvae/config.json"]
    patterns += [f"diffusion_pytorch_model{ending}", *(f"{key}/*.json" for key in keys)]
    patterns += [f"{key}/{ending}" for key in keys]
    ignored = None if entry.variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors"]
    return downloaded(entry.source, patterns, ignored, f"members.{name}: ")
