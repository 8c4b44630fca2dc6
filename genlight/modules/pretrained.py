"""Reading diffusers folders: network, noise schedule and VAE as data, never as code."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.schedulers import SEARCHED, build_scheduler, read_scheduler
from genlight.errors import UserError
from genlight.io import parse_json, read_json, verify_if_described
from genlight.modules.artifact_kind import told_kind
from genlight.modules.exported_pipeline import Network, network_style
from genlight.modules.latents import FrozenVAE
from genlight.modules.networks import check_label_rows, differences, first_of, label_rows, plain_config, prepare_network

NETWORK_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
# Transformer2DModel is what published DiT folders of before 2024 name their DiTTransformer2DModel
LEGACY_CLASSES = {"Transformer2DModel": "DiTTransformer2DModel"}
VAE_CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
# key of the denoised image's decoder in the pipelines that have one
VAE_KEYS = ("vae", "vqvae")
# the scheduler of a consistency model, which is no solver of a diffusion model
CONSISTENCY = "CMStochasticIterativeScheduler"
RECORD = "genlight.json"
# how safetensors calls the types of floating-point weights
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline folder holds. ``record`` is the folder's genlight.json, empty for other people's folders."""

    source: str
    network: Network
    vae: Network | None
    noise_schedule: NoiseSchedule
    prediction_type: str
    scheduler: functools.partial[Any]
    record: dict[str, Any]

    def apply_to(self, module: Any) -> None:
        """Give a DiffusionModule what it lacks; UserError naming the first keys in which the two disagree."""
        self._check_schedule(module)
        for name in module.taken_from_folder:
            setattr(module, name, _setting(self.record, name, getattr(module, name), f"{self.source}/{RECORD}"))
        self._check_steps(module)
        num_classes = self._num_classes(module)
        network = self._checked_network(num_classes)
        if module.network is None:
            module.network = network
        else:
            what = f"the network of {self.source} is not the module's"
            _check_same(what, network, module.network, "; module.network=null takes it")
            module.network.load_state_dict(network.state_dict())
        if self.vae is None and (module.vae is not None or module.vae_source is not None):
            raise UserError(f"module.vae is set, but {self.source} has no VAE: its network works in pixels")
        if self.vae is not None:
            if module.vae is not None:
                _check_same(f"module.vae and the VAE of {self.source} differ", module.vae.network, self.vae)
            module.vae, module.vae_source = FrozenVAE(self.vae), None
        module.noise_schedule, module.prediction_type = self.noise_schedule, self.prediction_type
        module.scheduler = module.scheduler or self.scheduler
        module.num_classes, module.class_conditional = num_classes, num_classes is not None
        module.class_names = self.record.get("class_names") or module.class_names
        module.build_scheduler()

    def _check_schedule(self, module: Any) -> None:
        found: dict[str, Any] = {}
        wanted: dict[str, Any] = {}
        if module.noise_schedule is not None:
            found["noise_schedule"] = {"family": self.noise_schedule.family, **self.noise_schedule.definition()}
            wanted["noise_schedule"] = {"family": module.noise_schedule.family, **module.noise_schedule.definition()}
        if module.prediction_type is not None:
            found["prediction_type"], wanted["prediction_type"] = self.prediction_type, module.prediction_type
        if different := differences(found, wanted, "module."):
            raise UserError(
                f"{self.source} was trained otherwise than the module is configured: {first_of(different)}; "
                "null takes what the folder says"
            )

    def _check_steps(self, module: Any) -> None:
        """UserError if the folder's scheduler is to be used and was not searched for the module's number of steps."""
        if module.scheduler is not None or self.scheduler.func.__name__ != SEARCHED:
            return
        available = sorted(int(steps) for steps in self.scheduler.keywords["schedules"])
        if module.num_inference_steps not in available:
            raise UserError(
                f"module.num_inference_steps = {module.num_inference_steps}, but the searched schedules of "
                f"{self.source} are for {', '.join(str(steps) for steps in available)}: set it to one of these, or "
                "module.scheduler to one of diffusers"
            )

    def _num_classes(self, module: Any) -> int | None:
        """Classes of the network. A class table of unknown origin is taken to hold no null class, unless it must."""
        rows = label_rows(self.network)
        if module.class_conditional is False or rows is None:
            if module.class_conditional:
                raise UserError(f"module.class_conditional is true, but the network of {self.source} has no classes")
            return None
        if network_style(self.network) == "dit":
            found: int | None = rows - 1
            if self.record.get("num_classes", found) is None and module.class_conditional is None:
                return None
        else:
            found = self.record.get("num_classes", module.num_classes if rows - 1 == module.num_classes else rows)
        if module.num_classes not in (None, found):
            raise UserError(f"module.num_classes = {module.num_classes}, but {self.source} has {found} classes")
        return found

    def _checked_network(self, num_classes: int | None) -> Network:
        try:
            check_label_rows(self.network, num_classes)
            return prepare_network(self.network, num_classes)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.source}: {error}") from error


def _setting(record: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """A number of a folder's record, of the type of the default, which stands in where the record has none."""
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | type(default)) or not value >= 0:
        raise UserError(f"{where}: {name} = {value!r} is not a number that {name} can be")
    return type(default)(value)


def read_pipeline(source: str | Path) -> Pipeline:
    """Read a diffusers pipeline folder, or a hub id.

    Raises:
        UserError: not found, not a pipeline of the kinds known here, damaged, or its weights do not fit its config.
    """
    folder = local_folder(source)
    index = read_object(folder / "model_index.json")
    key = next((key for key in ("unet", "transformer") if class_name_of(index, key)), None)
    if key is None:
        raise UserError(f"{source}: model_index.json names neither a unet nor a transformer")
    network = load_component(folder, index, key, NETWORK_CLASSES)
    vae = load_vae(folder, index)
    config = read_scheduler_config(component_folder(folder, "scheduler") / "scheduler_config.json")
    if config.get("_class_name") == CONSISTENCY:
        raise UserError(
            f"{source} is a consistency model, which module=consistency reads; its sampler cannot be searched"
        )
    try:
        defaults = _scheduler_defaults(str(config.get("_class_name")))
        schedule, prediction_type = read_scheduler({**defaults, **config})
        scheduler = _scheduler_partial({**defaults, **config}, schedule, prediction_type)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: scheduler_config.json cannot be used: {error}") from error
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    return Pipeline(str(source), network, vae, schedule, prediction_type, scheduler, record)


def load_component(folder: Path, index: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> Network:
    """The network under a key of model_index.json; UserError as `read_pipeline`."""
    return load_network(component_folder(folder, key), class_name_of(index, key), allowed)


def load_vae(folder: Path, index: Mapping[str, Any]) -> Network | None:
    """The autoencoder that model_index.json names; None if it names none."""
    key = next((key for key in VAE_KEYS if class_name_of(index, key)), None)
    return None if key is None else load_component(folder, index, key, VAE_CLASSES)


def component_folder(folder: Path, key: str) -> Path:
    """Folder of a component: its own, or in old pipelines with one network the pipeline's."""
    return folder / key if (folder / key).is_dir() else folder


def load_autoencoder(source: str | Path) -> Network:
    """The VAE of a folder or hub id: of an autoencoder's own folder, or the ``vae`` of a pipeline folder.

    Raises:
        UserError: not found, not an autoencoder known here, or damaged.
    """
    folder = Path(source) if Path(source).is_dir() else _from_hub(str(source))
    verify_if_described(folder)
    for sub in ("", *VAE_KEYS):
        if (folder / sub / "config.json").is_file():
            return load_network(
                folder / sub, str(read_object(folder / sub / "config.json").get("_class_name")), VAE_CLASSES
            )
    raise UserError(f"module.vae = {source} holds no config.json of an autoencoder, nor does a folder vae in it")


def local_folder(source: str | Path) -> Path:
    """The folder itself, or that of a hub id once downloaded; UserError for what is neither."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{source} is not a diffusers pipeline folder: it has no model_index.json{told_kind(folder)}"
            )
        verify_if_described(folder)
        return folder
    path = _from_hub(str(source))
    if not (path / "model_index.json").is_file():
        raise UserError(f"{source} on the hub is not a diffusers pipeline: it has no model_index.json")
    return path


def _from_hub(source: str) -> Path:
    """The hub's files of a model, configs and safetensors only, in the cache of huggingface_hub."""
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"{source} is not a folder: expected a diffusers folder, or a hub id such as google/ddpm-cifar10-32"
        )
    weights = ["*.safetensors", "*.safetensors.index.json"]
    # README.md states the licence, which goes on to what is made of the weights
    return downloaded(source, ["README.md", "model_index.json", RECORD, "*config.json", *weights])


def downloaded(source: str, patterns: Sequence[str], ignored: Sequence[str] | None = None, where: str = "") -> Path:
    """The files of a hub id, in the cache of huggingface_hub, which also serves where the hub is out of reach.

    Args:
        patterns, ignored: names of files to take and to leave, as huggingface_hub has them.
        where: beginning of the message, such as the config key.

    Raises:
        UserError: neither in reach nor in the cache.
    """
    from huggingface_hub import constants, get_session, snapshot_download

    files: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ignored}
    try:
        # asked once first: a download tries again for half a minute before it gives up
        get_session().head(constants.ENDPOINT, timeout=10.0)
        return Path(snapshot_download(source, **files))
    except Exception as error:  # httpx, huggingface_hub and the system each raise their own
        try:
            return Path(snapshot_download(source, **files, local_files_only=True))
        except Exception:
            reason = f"{first_line(error)} ({constants.ENDPOINT})"
            raise UserError(
                f"{where}{source!r} is neither a folder here nor a model of the hub in reach: {reason}"
            ) from error


def load_network(folder: Path, name: str, allowed: tuple[str, ...], **options: Any) -> Network:
    """A network from its folder, weights as safetensors, every key accounted for; options of `from_pretrained`."""
    network_class = _diffusers_class(str(folder), name, allowed)
    read_object(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no weights as safetensors; pickled weights are not read")
    try:
        return _from_pretrained(network_class, folder, **options)
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own class, diffusers OSError, torch RuntimeError
        raise UserError(f"{folder} cannot be loaded as {network_class.__name__}: {first_line(error)}") from error


def _from_pretrained(network_class: Any, source: str | Path, **options: Any) -> Network:
    # diffusers asks for it where some layers stay in float32, and for quantized networks
    meta_first = bool(getattr(network_class, "_keep_in_fp32_modules", None))
    meta_first |= "quantization_config" in read_object(Path(source) / "config.json")
    network, info = network_class.from_pretrained(
        str(source), use_safetensors=True, low_cpu_mem_usage=meta_first, output_loading_info=True, **options
    )
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [f"{entry[0]} has another shape" for entry in info["mismatched_keys"]]
    if problems:
        raise UserError(f"the weights of {source} do not fit its config.json: {first_of(problems)}")
    return network


def _diffusers_class(where: str, name: str, allowed: tuple[str, ...]) -> Any:
    import diffusers

    name = LEGACY_CLASSES.get(name, name)
    if name not in allowed:
        raise UserError(f"{where} is of class {name}; known here are {', '.join(allowed)} of diffusers")
    return getattr(diffusers, name)


def class_name_of(index: Mapping[str, Any], key: str) -> str:
    """Class of a component in model_index.json, "" if it has none; only diffusers' own classes are known here."""
    entry = index.get(key)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1] if entry[0] == "diffusers" else f"{entry[0]}.{entry[1]}"
    return ""


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """The scheduler's config; diffusers writes one default as -Infinity, which is no JSON and is left out here."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if path.stat().st_size > 1_000_000:
        raise UserError(f"{path} is too long for the config of a scheduler")
    text = path.read_text("utf-8", errors="replace")
    config = parse_json(re.sub(r'"lambda_min_clipped":\s*-Infinity', '"lambda_min_clipped": null', text), str(path))
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    if config.get("lambda_min_clipped", "") is None:
        del config["lambda_min_clipped"]
    return config


def _scheduler_class(name: str) -> Any:
    """The class of a scheduler: of diffusers, or the one that samples searched schedules, never code of the folder."""
    if name == SEARCHED:
        from genlight.diffusion.solver_schedule import SolverScheduleScheduler

        return SolverScheduleScheduler
    import diffusers

    return getattr(diffusers, name)


def _scheduler_defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(_scheduler_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _scheduler_partial(
    config: Mapping[str, Any], schedule: NoiseSchedule, prediction_type: str
) -> functools.partial[Any]:
    """The scheduler class with those options that the schedule does not decide already; all, of a searched one."""
    scheduler_class = _scheduler_class(str(config["_class_name"]))
    if config["_class_name"] == SEARCHED:
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        return functools.partial(scheduler_class, **options)
    plain = build_scheduler(scheduler_class, schedule, prediction_type).config
    options = {key: value for key, value in config.items() if key in plain and not key.startswith("_")}
    changed = {key: value for key, value in options.items() if _plain(plain[key]) != _plain(value)}
    return functools.partial(scheduler_class, **changed)


def _check_same(what: str, found: Network, wanted: Network, hint: str = "") -> None:
    one, two = ({"class": type(network).__name__, **plain_config(network)} for network in (found, wanted))
    if different := differences(one, two):
        raise UserError(f"{what}: {first_of(different)}{hint}")


def stored_dtype(
    files: Sequence[Path], variant: str | None = None, known: Mapping[str, torch.dtype] = STORED
) -> torch.dtype | None:
    """The type of the first floating-point weight in files of safetensors; None if there is none.

    Args:
        files: in their order; where some are of the variant, those alone count.
        variant: such as "fp16", part of the names of files.
        known: types that count, by the names of safetensors.

    Raises:
        UserError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in [f for f in files if variant and f".{variant}" in f.name] or files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - no mapping
                    if (found := known.get(tensors.get_slice(key).get_dtype())) is not None:
                        return found
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {first_line(error)}") from error
    return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; UserError for a missing file or another value."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def first_line(error: BaseException) -> str:
    """What an error says first, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
