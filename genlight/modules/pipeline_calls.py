"""Loading a diffusers pipeline of any kind, and what its calls are made with: schedulers and remembered prompts."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import inspect
import json
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from genlight.diffusion.export_scheduler import scheduler_of
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import SEARCHED, build_like
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.serialization import SolverBank, TableRecord
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.errors import UserError
from genlight.modules.pretrained import first_line, local_folder, read_object, read_scheduler_config, stored_dtype
from genlight.reports.origin import HUB_ID

SchedulerChoice = str | type | functools.partial[Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# key of the denoising network in a pipeline's folder
_NETWORKS = ("transformer", "unet", "prior")
# arguments of a pipeline's call that say how many frames a video has
FRAMES = ("num_frames", "video_length")
# arguments of a pipeline's call that are not free, and what decides them
_DECIDED = {
    "prompt": "data.path",
    "latents": "data.seed",
    "generator": "data.seed",
    "num_inference_steps": "module.num_inference_steps",
    "guidance_scale": "module.guidance_scale",
    "height": "module.height",
    "width": "module.width",
    "num_frames": "module.num_frames",
    "video_length": "module.num_frames",
    "timesteps": "module.scheduler",
    "sigmas": "module.scheduler",
    "output_type": "the module",
    "return_dict": "the module",
}


def load_pipeline(source: str, dtype: str, variant: str | None, trust_remote_code: bool) -> Any:
    """A diffusers pipeline from its folder or hub id; weights are read as safetensors.

    A searched scheduler is built from its config by genlight's own class: the copy in the folder is not run.

    Args:
        dtype: a key of `DTYPES`, or "auto": the type that the denoising network is stored in.
        variant: ending of the names of weight files, such as "fp16".
        trust_remote_code: run code that the folder brings along.

    Raises:
        UserError: not found, not a pipeline, damaged, or without weights as safetensors.
    """
    import diffusers

    folder = pipeline_folder(source, variant, trust_remote_code)
    index = read_object(folder / "model_index.json")
    given: dict[str, Any] = {key: None for key, entry in index.items() if entry == [None, None]}
    searched = _searched_scheduler(folder, index)
    if searched is not None:
        given["scheduler"] = None
    options: dict[str, Any] = {"variant": variant} if variant else {}
    if trust_remote_code:
        options["trust_remote_code"] = True
    try:
        found = _network_dtype(folder, variant) if dtype == "auto" else DTYPES[dtype]
        pipeline: Any = diffusers.DiffusionPipeline
        pipe = pipeline.from_pretrained(str(folder), use_safetensors=True, dtype=found, **given, **options)
    except Exception as error:  # diffusers, transformers, safetensors and torch each raise their own
        raise UserError(f"{source} cannot be loaded as a diffusers pipeline: {first_line(error)}") from error
    if searched is not None:
        pipe.register_modules(scheduler=searched)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _network_dtype(folder: Path, variant: str | None) -> torch.dtype:
    """The type that the denoising network is stored in; a quantized one says it, as its first tensor may be a scale."""
    for key in _NETWORKS:
        config = read_object(folder / key / "config.json") if (folder / key).is_dir() else {}
        settings = (config.get("quantization_config") or {}).get("settings", {})
        if (found := DTYPES.get(settings.get("dtype", ""))) is not None:
            return found
    files = [file for key in _NETWORKS for file in sorted((folder / key).glob("*.safetensors"))]
    return stored_dtype(files, variant) or torch.float32


def pipeline_folder(source: str, variant: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a pipeline on this machine; a hub id is downloaded into the cache of huggingface_hub, its card
    with it.

    Raises:
        UserError: neither a pipeline folder nor a pipeline of the hub in reach.
    """
    if Path(source).exists() or not HUB_ID.fullmatch(source):
        return local_folder(source)  # which says what is wrong
    import diffusers
    from huggingface_hub import constants, get_session, hf_hub_download

    download = functools.partial(
        diffusers.DiffusionPipeline.download, source, use_safetensors=True, variant=variant,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    try:
        # asked once first: a download tries again for half a minute before it gives up
        get_session().head(constants.ENDPOINT, timeout=10.0)
        folder = Path(download())
    except Exception as error:  # httpx, huggingface_hub and the system each raise their own
        try:
            return Path(download(local_files_only=True))
        except Exception:
            reason = f"{first_line(error)} ({constants.ENDPOINT})"
            raise UserError(f"{source!r} is neither a folder here nor a model of the hub in reach: {reason}") from error
    # README.md states the licence, which goes on to what is made of the weights; diffusers leaves it out
    with suppress(Exception):  # a model may have none
        hf_hub_download(source, "README.md", revision=folder.name)
    return folder


def _searched_scheduler(folder: Path, index: Mapping[str, Any]) -> Any:
    """The searched scheduler of a folder, None where it has one of diffusers."""
    entry = index.get("scheduler")
    if not isinstance(entry, list) or entry[-1:] != [SEARCHED]:
        return None
    config = read_scheduler_config(folder / "scheduler" / "scheduler_config.json")
    try:
        return SolverScheduleScheduler(**{key: value for key, value in config.items() if not key.startswith("_")})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: scheduler_config.json cannot be used: {first_line(error)}") from error


def scheduler_of_table(table: SolverTable, prediction: Prediction) -> SolverScheduleScheduler:
    """The diffusers scheduler that samples one compiled table, with num_inference_steps = `table.nfe`.

    Raises ValueError for an analytical first step that pipelines cannot make, see `scheduler_of`.
    """
    bank = SolverBank.of(prediction, {})
    return scheduler_of(SolverBank(**{**vars(bank), "tables": {table.nfe: TableRecord.of(table)}}))


class PromptMemo:
    """`encode_prompt` of a pipeline, which keeps what it has answered: text encoders run once for each call's prompts.

    Answers lie in the memory of the host, as copies, the oldest given up beyond `max_bytes`. Calls with tensors among
    their arguments are passed through, as are answers that are no tensors and no lists of tensors.

    Args:
        pipe: the pipeline; its present `encode_prompt` is what answers.
        max_bytes: of all answers together.
    """

    def __init__(self, pipe: Any, max_bytes: int = 4 << 30) -> None:
        self._pipe, self._encode, self.max_bytes = pipe, pipe.encode_prompt, max_bytes
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        functools.update_wrapper(self, self._encode)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the pipeline's `encode_prompt` answers."""
        try:
            # an answer lies on the device of the pipeline, if none is given; to find that walks through all its modules
            device = options.get("device") or self._pipe._execution_device
            key = _key((arguments, options, device, self._pipe.dtype))
        except TypeError:
            return self._encode(*arguments, **options)
        if key not in self._kept:
            answer = self._encode(*arguments, **options)
            if not isinstance(answer, Tensor | list | tuple):
                return answer
            self._kept[key] = _mapped(answer, lambda x: (x.device, x.detach().to("cpu", copy=True))), _bytes(answer)
            while sum(size for _, size in self._kept.values()) > self.max_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return _restored(self._kept[key][0])


def wrapped_prompts(pipe: Any) -> Any:
    """The pipeline, its prompts remembered where it has an `encode_prompt`."""
    if hasattr(pipe, "encode_prompt"):
        pipe.encode_prompt = PromptMemo(pipe)
    return pipe


def plain_pipeline(pipe: Any, guidance_scale: float | None) -> Any:
    """The pipeline; of a latent consistency model the Stable Diffusion of its parts, which makes the same images.

    What LatentConsistencyModelPipeline returns is not its latents but what the step of LCM alone gives beside them, so
    that no other scheduler can take its place, and none without steps.

    Args:
        guidance_scale: of its calls; a warning that the default is another where it is None.
    """
    import diffusers

    lcm: Any = diffusers.LatentConsistencyModelPipeline
    kind: Any = diffusers.StableDiffusionPipeline
    if not isinstance(pipe, lcm):
        return pipe
    # without the scheduler, whose config it would change
    parts = {**pipe.components, "scheduler": None}
    made = kind(**parts, requires_safety_checker=pipe.config.requires_safety_checker)
    made.register_modules(scheduler=pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    if guidance_scale is None:
        default = inspect.signature(made.__call__).parameters["guidance_scale"].default
        warnings.warn(
            f"a {type(pipe).__name__} is called as {kind.__name__}, whose guidance_scale is {default:g} where none is "
            "set: set module.guidance_scale",
            stacklevel=2,
        )
    return made


def called(pipe: Any, scheduler: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What a pipeline returns with another scheduler in it.

    Raises:
        UserError: the pipeline asks for timesteps in a way that the scheduler does not know.
    """
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        result: Tensor = pipe(**arguments, return_dict=False)[0]
    except (AssertionError, TypeError, ValueError) as error:
        inside = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not inside & {"retrieve_timesteps", "set_timesteps"}:
            raise
        kind = type(scheduler).__name__
        raise UserError(f"{type(pipe).__name__} has no timesteps by {kind}: {first_line(error)}") from error
    finally:
        pipe.scheduler = own
    return result


def check_pipeline(pipe: Any, settings: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """UserError unless the pipeline's call takes prompts, noise and what the module sets.

    Args:
        settings: guidance_scale, height, width and num_frames, None where they are not set.
        call: the further arguments of module.call.
    """
    name, known = type(pipe).__name__, list(inspect.signature(pipe.__call__).parameters)
    if "prompt" not in known:
        raise UserError(f"{name} takes no prompts; use module=diffusion_pretrained for it")
    for key in ("latents", "num_inference_steps", "output_type"):
        if key not in known:
            raise UserError(f"{name} takes no {key} in its call, without which it cannot be measured on given noise")
    for key, value in settings.items():
        if value is not None and key not in known and not (key == "num_frames" and set(FRAMES) & set(known)):
            what = "makes images" if key == "num_frames" else "has no such argument"
            raise UserError(f"module.{key} = {value}, but {name} {what}: set it to null")
    for key in call:
        if key in _DECIDED or key.endswith("_per_prompt"):
            raise UserError(f"module.call.{key} is not free: it is set by {_DECIDED.get(key, 'data.num_samples')}")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it takes {', '.join(known)}"
            raise UserError(f"module.call.{key}: {name} has no such argument; {hint}")


def built_scheduler(own: Any, choice: SchedulerChoice) -> Any:
    """The scheduler of a choice, for what the network of a pipeline with the scheduler `own` was trained on.

    Raises:
        UserError: the two do not belong together, or a scheduler of a kind that is not known here.
    """
    options = choice.keywords if isinstance(choice, functools.partial) else {}
    kind = cast(type, choice.func) if isinstance(choice, functools.partial) else choice
    try:
        return build_like(own, kind, **options)
    except (KeyError, ValueError) as error:
        raise UserError(f"module.scheduler: {error}") from error


def fresh(scheduler: Any) -> Any:
    """A scheduler with the state of an earlier call left behind."""
    return copy.deepcopy(scheduler)


def signed(result: Tensor) -> Tensor:
    """Images or videos in [-1, 1] of those in [0, 1]."""
    return (2 * result.float() - 1).clamp(-1, 1)


def slices(count: int, size: int | None) -> list[slice]:
    """Parts of range(count), of `size` each; one if `size` is None."""
    return [slice(start, start + (size or count)) for start in range(0, count, size or count)]


def plain_settings(part: Any) -> dict[str, Any]:
    """Public entries of a config of diffusers or transformers, as JSON has them."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    public = {key: value for key, value in config.items() if not str(key).startswith("_")}
    result: dict[str, Any] = json.loads(json.dumps(public, sort_keys=True, default=str))
    return result


def weights_digest(networks: nn.Module) -> str:
    """SHA-256 (hex) of the names, types and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(networks.state_dict().items()):
        digest.update(f"{name}/{value.dtype}/".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(value: Any) -> str:
    """Text that tells arguments of a call apart; TypeError for what has no such text."""
    if isinstance(value, list | tuple):
        return f"[{','.join(_key(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name!r}:{_key(entry)}' for name, entry in sorted(value.items()))}}}"
    if value is None or isinstance(value, str | bool | int | float | torch.device | torch.dtype):
        return repr(value)
    raise TypeError(f"{type(value).__name__} cannot be a key")


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


def _restored(value: Any) -> Any:
    """Tensors on the devices that they came from, as copies that a pipeline may write into."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.device):
        return value[1].to(value[0], copy=True)
    if isinstance(value, list | tuple):
        return type(value)(_restored(entry) for entry in value)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(entry) for entry in value) if isinstance(value, list | tuple) else 0
