"""Any diffusers pipeline that makes images or videos of text: measured and searched as it is, never trained."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import read_scheduler
from genlight.diffusion.solver.compile import SolverTable
from genlight.errors import UserError
from genlight.metrics.text_image import middle_frame
from genlight.modules.generation import GeneratorValidation
from genlight.modules.networks import noise_seeded_generators
from genlight.modules.offloading import OffloadedNetworks
from genlight.modules.pipeline_calls import (
    DTYPES,
    FRAMES,
    SchedulerChoice,
    built_scheduler,
    called,
    check_pipeline,
    fresh,
    load_pipeline,
    plain_pipeline,
    plain_settings,
    scheduler_of_table,
    signed,
    slices,
    weights_digest,
    wrapped_prompts,
)
from genlight.modules.pipeline_latents import latent_kind, no_steps
from genlight.modules.pipeline_lora import fuse_lora
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.modules.zoo import Zoo
from genlight.modules.zoo_pipelines import add_members, by_turns, own_network, schedule_members, scheduled_of


class PipelineModule(OffloadedNetworks, GeneratorValidation, LightningModule):
    """A text-to-image or text-to-video pipeline of diffusers, as a generator whose classes are prompts.

    The pipeline itself is called, with another scheduler where the sampler is searched; nothing here knows one family
    of networks from another. Label i stands for prompt i of the datamodule's list. Prompts are encoded once for each
    batch of prompts and kept. A sample depends on its noise and prompt alone, not on the batch it is in.

    Args:
        pretrained: diffusers pipeline folder or hub id; read in ``configure_model``.
        dtype: type of the weights: "float32", "float16", "bfloat16", or "auto", that of the stored network.
        variant: ending of the names of weight files, such as "fp16".
        num_inference_steps: steps of the pipeline's own scheduler.
        guidance_scale: None: what the pipeline does when it is not told.
        height, width: of an image in pixels. None: the pipeline's default.
        num_frames: of a video. None: the pipeline's default.
        batch_size: samples in one call of the pipeline. None: a whole batch of the data.
        scheduler: a diffusers scheduler instead of the folder's: a class name, a class, or a partial with options.
        call: further arguments of the pipeline's call, such as ``max_sequence_length`` or ``negative_prompt``.
        trust_remote_code: run code that the folder brings along.
        offload: keep the networks in the memory of the host, but for the one that runs; slower.
        members: further denoisers by name, beside the pipeline's, which is called "own"; see `load_zoo`.
        resident: so many of these and "own" at most stay on the device. None: all, or one where `offload` is set.
        lora: adapters that are added to the weights as they are read, see `fuse_lora`; not beside `members`.

    Attributes:
        prompts: texts by label; set by ``check_data``.
        zoo: the members and where they are from; None without members.
        sampler: None, or the searched sampler; set by ``set_sampler``.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    # labels belong to the noise of a teacher
    class_conditional = True
    class_names: list[str] | None = None
    sampler: Any = None

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        variant: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int | None = None,
        scheduler: SchedulerChoice | None = None,
        call: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        members: Mapping[str, Any] | None = None,
        resident: int | None = None,
        lora: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"module.dtype = {dtype!r} must be auto, {', '.join(DTYPES)}")
        sizes = {"height": height, "width": width, "num_frames": num_frames, "batch_size": batch_size}
        for key, value in {"num_inference_steps": num_inference_steps, "resident": resident, **sizes}.items():
            if value is not None and value < 1:
                raise ValueError(f"module.{key} = {value} must be at least 1")
        if lora is not None and members:
            raise ValueError("module.lora beside members: fuse it, and save the pipeline, for schedules name folders")
        self.pretrained, self.weights_dtype, self.variant = pretrained, dtype, variant
        self.num_inference_steps, self.batch_size = num_inference_steps, batch_size
        self.trust_remote_code, self.entries = trust_remote_code, dict(members or {})
        self._guidance_scale, self.height, self.width, self.num_frames = guidance_scale, height, width, num_frames
        self.scheduler, self.call, self.offload, self.lora = scheduler, dict(call or {}), offload, lora
        self.resident = 1 if offload and resident is None else resident
        self.prompts: list[str] | None = None
        self.zoo: Zoo | None = None
        self.networks = nn.ModuleDict()
        self._pipe: Any = None
        self._latents: dict[torch.dtype, tuple[tuple[int, ...], torch.dtype]] = {}  # by type of the weights
        self._weights_digest: dict[torch.dtype, str] = {}

    def configure_model(self) -> None:
        """Read the pipeline, once; called by Lightning and by whatever needs it."""
        if self._pipe is None:
            self.load_pretrained(self.pretrained)

    def load_pretrained(self, source: str | Path) -> None:
        """Take the pipeline of a diffusers folder or hub id.

        Raises:
            UserError: not a pipeline folder, unreachable, damaged, not one that makes images or videos of prompts, or
                one that does not take what the module is configured with.
        """
        pipe = load_pipeline(str(source), self.weights_dtype, self.variant, self.trust_remote_code)
        fuse_lora(pipe, self.lora)
        self.pretrained = str(source)
        self.adopt(pipe)

    def adopt(self, pipe: Any) -> None:
        """Take a pipeline that is there already; UserError as in `load_pretrained`."""
        sizes = {"guidance_scale": self._guidance_scale, "height": self.height, "width": self.width}
        pipe = plain_pipeline(pipe, self._guidance_scale)
        check_pipeline(pipe, {**sizes, "num_frames": self.num_frames}, self.call)
        if self.scheduler is not None:
            pipe.scheduler = built_scheduler(pipe.scheduler, self.scheduler)
        available = getattr(pipe.scheduler, "available_steps", None)
        if available is not None and self.num_inference_steps not in available:
            raise UserError(
                f"module.num_inference_steps = {self.num_inference_steps}, but the searched schedules of the pipeline "
                f"are for {', '.join(map(str, available))}: set it to one of these, or module.scheduler to another"
            )
        self.zoo = add_members(pipe, self.entries, self.pretrained, self.variant, self.resident)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.networks = nn.ModuleDict(parts)
        self.networks.requires_grad_(False).eval()
        self._pipe, self._latents, self._weights_digest = wrapped_prompts(pipe), {}, {}

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline, read if need be."""
        self.configure_model()
        return self._pipe

    @property
    def members(self) -> dict[str, nn.Module]:
        """The denoisers that take turns, by name, the pipeline's own among them; empty where it has one alone."""
        return {} if self.scheduled is None else self.scheduled.members

    @property
    def scheduled(self) -> ScheduledDenoiser | None:
        """What lets the members take turns; None where the pipeline has one network alone."""
        return scheduled_of(self.pipe)

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance: the module's, else what the pipeline does when it is not told; 1 if it has none."""
        if self._guidance_scale is not None:
            return self._guidance_scale
        parameter = inspect.signature(self.pipe.__call__).parameters.get("guidance_scale")
        return 1.0 if parameter is None or not isinstance(parameter.default, int | float) else float(parameter.default)

    @property
    def prediction(self) -> Prediction:
        """What the network predicts and its noise schedule, as the scheduler of the folder says.

        Raises:
            UserError: a scheduler of a kind that is not known here; the pipeline can be measured, but not searched.
        """
        try:
            schedule, prediction_type = read_scheduler(self.pipe.scheduler)
        except (KeyError, ValueError) as error:
            raise UserError(f"{self.pretrained}: its scheduler cannot be replaced: {error}") from error
        return Prediction(prediction_type, schedule)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample's noise: what the pipeline takes as ``latents``, without the batch; packed for Flux."""
        return self.latent_kind()[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image, or of one frame; found by decoding."""
        noise = torch.zeros(1, *self.sample_shape, device=self.device)
        channels, height, width = self.decode(noise).shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Number of prompts, None before they are known."""
        return None if self.prompts is None else len(self.prompts)

    def check_data(self, datamodule: Any) -> None:
        """Take the prompts of the data; UserError if it has none."""
        prompts = getattr(datamodule, "prompts", None)
        if not prompts:
            name = getattr(datamodule, "name", type(datamodule).__name__)
            raise UserError(f"module=pipeline needs prompts, which data={name} does not have: use data=prompts")
        self.prompts = list(prompts)

    def build_scheduler(self, scheduler: SchedulerChoice | None = None) -> Any:
        """A fresh scheduler: the pipeline's own, or one of diffusers that fits its noise schedule and prediction."""
        own = self.pipe.scheduler
        return fresh(own) if scheduler is None else built_scheduler(own, scheduler)

    def set_sampler(self, sampler: Any) -> None:
        """Sample with a `TableSampler` from now on; None puts the pipeline's own scheduler back."""
        self.sampler = sampler

    def set_members(self, timesteps: Sequence[float], names: Sequence[str]) -> None:
        """Let members[names[i]] answer at timesteps[i] under a set sampler; (): the pipeline's own network always."""
        schedule_members(self.pipe, timesteps, names)

    def sample(self, noise: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from unit noise [B, *sample_shape]; of a video the middle frame.

        Args:
            label, options: as in :meth:`sample_latents`.
        """
        return middle_frame(self.sample_whole(noise, label, **options))

    def sample_whole(self, noise: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
        """As `sample`, but of a video all frames [B, F, C, H, W]."""
        return signed(self._sampled(noise, label, "pt", **options))

    def sample_latents(self, noise: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
        """Undecoded samples [B, *sample_shape] in float32 from unit noise of the same shape.

        Args:
            label: number of the prompt of each sample [B].
            options: num_inference_steps, guidance_scale, scheduler, generator instead of those of the module, as in
                `DiffusionModule.sample_latents`. Steps or a scheduler take the place of a sampler that was set.
        """
        return self._sampled(noise, label, "latent", **options)

    def sample_tables(self, tables: Sequence[SolverTable], noise: Tensor, label: Tensor | None) -> Tensor:
        """Undecoded samples [S, B, *sample_shape] of S compiled tables, one after the other, from noise [B, ...].

        Raises ValueError for a table that begins with an analytical step which pipelines cannot make.
        """
        prediction = self.prediction
        made = [
            self._batches(scheduler_of_table(table, prediction), noise, label, "latent", table.nfe) for table in tables
        ]
        return torch.stack(made).to(torch.promote_types(noise.dtype, torch.float32))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of undecoded samples [B, *sample_shape], by the pipeline's own last lines.

        The pipeline is called with no steps at all, so the denoising network is not asked.
        """
        return middle_frame(signed(self._batches(no_steps(), latents, None, "pt", 1)))

    def _sampled(
        self,
        noise: Tensor,
        label: Tensor | None,
        output_type: str,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: SchedulerChoice | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        if label is None:
            raise ValueError("sampling a pipeline needs labels: the number of each sample's prompt")
        searched = self.sampler is not None and num_inference_steps is None and scheduler is None
        if searched:
            chosen, steps = scheduler_of_table(self.sampler.table, self.prediction), self.sampler.table.nfe
        else:
            chosen, steps = self.build_scheduler(scheduler), num_inference_steps or self.num_inference_steps
        with by_turns(self.pipe, searched):
            return self._batches(chosen, noise, label, output_type, steps, guidance_scale, generator).float()

    def _batches(
        self,
        scheduler: Any,
        noise: Tensor,
        label: Tensor | None,
        output_type: str,
        steps: int,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Results of the pipeline for noise [B, ...], at most `batch_size` samples in a call."""
        found = noise_seeded_generators(noise) if generator is None else generator
        prompts = [""] * len(noise) if label is None else self.prompts_of(label)
        latents = noise.to(self.latent_kind()[1])
        arguments = {"num_inference_steps": steps, "output_type": output_type}
        scale = self._guidance_scale if guidance_scale is None else guidance_scale
        results = []
        for rows in slices(len(noise), self.batch_size):
            drawn = found[rows] if isinstance(found, list) else found
            own = {"prompt": prompts[rows], "latents": latents[rows], "generator": drawn, "guidance_scale": scale}
            results.append(self._call(scheduler, len(latents[rows]), {**arguments, **own}))
        return torch.cat(results)

    def prompts_of(self, label: Tensor) -> list[str]:
        """The texts of labels [B].

        Raises ValueError where the prompts are not known, or for a label beyond them.
        """
        if self.prompts is None:
            raise ValueError("the prompts are not known: call check_data with a datamodule that has some")
        numbers = [int(number) for number in label.tolist()]
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self.prompts):
            raise ValueError(
                f"label: {min(numbers)} … {max(numbers)} are not all among the {len(self.prompts)} prompts"
            )
        return [self.prompts[number] for number in numbers]

    @torch.no_grad()
    def _call(self, scheduler: Any, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """What the pipeline returns for `count` samples with another scheduler in it."""
        pipe = self.pipe
        known = inspect.signature(pipe.__call__).parameters
        settings: dict[str, Any] = {"height": self.height, "width": self.width}
        settings |= {key: self.num_frames for key in FRAMES if key in known}
        # a text for all: some pipelines want one for each prompt
        further = {k: [v] * count if "prompt" in k and isinstance(v, str) else v for k, v in self.call.items()}
        given = {k: v for k, v in {**settings, **arguments}.items() if v is not None and k in known}
        self.networks.eval()
        return called(pipe, scheduler, {**given, **further})

    def latent_kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of one sample and type of the ``latents`` that the pipeline takes: those of what it draws itself."""
        if (dtype := self.pipe.dtype) not in self._latents:
            ask = partial(self._call, no_steps(), 1)
            self._latents[dtype] = latent_kind(ask, self._guidance_scale, type(self.pipe).__name__)
        return self._latents[dtype]

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> None:
        """Sample, and hand images and, to metrics that want them, their prompts to the metrics."""
        if hasattr(self.metrics, "set_prompts"):
            self.metrics.set_prompts(self.prompts_of(batch["label"]))
        super().validation_step(batch, batch_index)

    def configure_optimizers(self) -> Any:
        """UserError: a pipeline is not trained."""
        raise UserError("module=pipeline is measured and searched as it is: use validate; fit has nothing to train")

    def training_step(self, *_: Any) -> Any:
        """UserError: a pipeline is not trained."""
        self.configure_optimizers()

    def description(self) -> dict[str, Any]:
        """What the samples mean beside noise and sampler, as plain values: pipeline, parts, settings, prompts."""
        pipe = self.pipe
        parts = {
            name: {"class": type(part).__name__, "config": plain_settings(part)} for name, part in self.networks.items()
        }
        settings = {key: getattr(self, key) for key in ("height", "width", "num_frames", "call")}
        prompts = None if self.prompts is None else hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        scheduler = {"class": type(pipe.scheduler).__name__, "config": plain_settings(pipe.scheduler)}
        return {
            "pipeline": type(pipe).__name__,
            "parts": parts,
            "scheduler": scheduler,
            "settings": settings,
            "prompts": prompts,
        }

    def fingerprint(self) -> str:
        """SHA-256 over the description and the weights, which are read once."""
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True, default=str).encode())
        if (dtype := self.pipe.dtype) not in self._weights_digest:
            self._weights_digest[dtype] = weights_digest(self.networks)
        digest.update(self._weights_digest[dtype].encode())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline as a diffusers folder, weights as safetensors, with its own scheduler."""
        with own_network(self.pipe):
            self.pipe.save_pretrained(str(folder), safe_serialization=True)
