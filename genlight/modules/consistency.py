"""Consistency models: students of a diffusion model, or on their own, that sample in one step or a few."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from genlight.diffusion.consistency import Objective, consistency_function, heun_step
from genlight.diffusion.distances import DISTANCES, Distance, distance
from genlight.diffusion.noise_schedules import EDMSchedule, expand
from genlight.errors import UserError
from genlight.modules.consistency_folder import SCHEDULER, read_consistency
from genlight.modules.diffusion import DiffusionModule, SchedulerChoice
from genlight.modules.exported_pipeline import Network, predict
from genlight.modules.latents import FrozenVAE
from genlight.modules.networks import differences, first_of, plain_config, prepare_network
from genlight.modules.target_network import TargetNetwork, has_stepped, refuse_shards, repeatable
from genlight.modules.teacher import FrozenTeacher, read_teacher, translate_times
from genlight.recipes import fit_below_where_missing

# of the checkpoint: the target's weights are neither the student's nor a submodule's
TARGET = "consistency_target"


class ConsistencyModule(DiffusionModule):
    """A consistency model (Song et al. 2023): f(x, σ) = c_skip x + c_out F(c_in x, 250 ln σ), trained by an objective.

    The loss of a sample is w(σ, σ') d(f(x, σ), f_target(x', σ')), see `genlight.diffusion.consistency`. Student and
    target drop the same units. It samples with diffusers' CMStochasticIterativeScheduler, in whose form it is saved:
    one step is f(sigma_max z, sigma_max). The noise of later steps comes from generators that the sample's own noise
    seeds, so that a sample does not depend on the batch it is in.

    The teacher and the target are no submodules: neither is trained, averaged or part of the weights. A target with
    weights of its own is kept in the checkpoint beside them.

    Args:
        network: UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel; None takes the architecture of the teacher,
            or the network of ``pretrained``.
        noise_schedule: sigma_min, sigma_max and sigma_data.
        objective: what training compares; None only samples.
        distance: "l2", "l1", "norm", "pseudo_huber", "huber" or "lpips"; None: that of the objective.
        teacher: a diffusers pipeline folder or hub id, or the folder of a genlight fit: any diffusion model whose
            range of noise reaches sigma_max. Read when it is needed.
        teacher_recipe: the experiment whose fit makes the folder ``teacher`` where it is missing, see `prepare`.
        teacher_guidance_scale: classifier-free guidance of the teacher; 1 is none.
        init_from_teacher: a fit starts from the teacher's weights; the architectures must agree. For teachers of an EDM
            schedule the time embedding is translated, so that the student starts as the teacher's function; for others
            it has to learn what its times mean.
        rho: of the Karras grid.
        num_train_timesteps: levels of the grid from which the sampler takes its steps.
        optimizer, lr_scheduler, num_inference_steps, class_conditional, num_classes, label_dropout, vae, compile: as
            in DiffusionModule.
        pretrained: a pipeline folder or hub id of a consistency model to start from.

    Raises:
        ValueError, TypeError: arguments that do not fit each other, naming the config key.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        noise_schedule: EDMSchedule | None = None,
        objective: Objective | None = None,
        *,
        distance: str | None = None,
        teacher: str | None = None,
        teacher_recipe: str | None = None,
        teacher_guidance_scale: float = 1.0,
        init_from_teacher: bool = True,
        rho: float = 7.0,
        num_train_timesteps: int = 40,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        num_inference_steps: int = 1,
        class_conditional: bool | None = False,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        vae: nn.Module | str | None = None,
        compile: bool = False,
        pretrained: str | None = None,
    ) -> None:
        self.teacher_source, self.teacher_recipe = teacher, teacher_recipe  # asked while the base class checks
        self.rho, self.num_train_timesteps = float(rho), int(num_train_timesteps)
        schedule = noise_schedule or EDMSchedule()
        super().__init__(
            network,
            schedule,
            "edm",
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            num_inference_steps=num_inference_steps,
            class_conditional=class_conditional,
            num_classes=num_classes,
            label_dropout=label_dropout,
            vae=vae,
            compile=compile,
            pretrained=pretrained,
        )
        if schedule.family != "edm":
            raise ValueError(f"module.noise_schedule must be an EDMSchedule, not {schedule!r}")
        if objective is not None and objective.needs_teacher and teacher is None:
            raise ValueError(f"module.objective {type(objective).__name__} needs module.teacher, which is null")
        name = distance or (objective.distance if objective is not None else "l2")
        if name not in DISTANCES:
            raise ValueError(f"module.distance = {name!r}; known are {', '.join(DISTANCES)}")
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(
                f"module.num_inference_steps = {num_inference_steps} must be at least 1 and not exceed "
                f"module.num_train_timesteps = {num_train_timesteps}"
            )
        # what the weights mean, in words of its own: no solver of another prediction type samples them
        self.prediction_type = "consistency"
        self.objective, self.distance = objective, name
        self.teacher_guidance_scale, self.init_from_teacher = float(teacher_guidance_scale), init_from_teacher
        self._teacher: FrozenTeacher | None = None
        self._initialised = False
        self._total_steps = 1
        self.target = TargetNetwork()

    def _require(self, key: str, value: Any) -> None:
        if self.teacher_source is None:
            super()._require(key, value)

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the teacher by ``teacher_recipe`` below ``run_root`` if its folder is missing; see `genlight.recipes`."""
        if self.teacher_source is not None and self.teacher_recipe is not None:
            fit_below_where_missing(self.teacher_recipe, self.teacher_source, "module.teacher", run_root, cache)

    @property
    def teacher(self) -> FrozenTeacher:
        """The frozen teacher, read if need be.

        Raises:
            UserError: there is none, it cannot be read, its range of noise ends below sigma_max, or its classes differ.
        """
        if self._teacher is None:
            if self.teacher_source is None:
                raise UserError("module.teacher is null")
            teacher, schedule = read_teacher(self.teacher_source, self.teacher_guidance_scale), self._schedule
            highest = teacher.prediction.schedule.noise_level(teacher.prediction.schedule.t_max)
            if schedule.t_max > highest * (1 + 1e-6):
                raise UserError(
                    f"module.noise_schedule.sigma_max = {schedule.t_max:g}, but the teacher {self.teacher_source} "
                    f"knows noise up to {highest:g} only"
                )
            known = teacher.module.num_classes if teacher.module.class_conditional else None
            if self.class_conditional is not None and (self.num_classes if self.class_conditional else None) != known:
                raise UserError(
                    f"module.num_classes = {self.num_classes if self.class_conditional else None}, but the teacher "
                    f"{self.teacher_source} has {known} classes: set module.class_conditional to null, as the teacher's"
                )
            self._teacher = teacher
        return self._teacher

    def configure_model(self) -> None:
        """Read ``pretrained``, or what the teacher decides, once; a fit starts from the teacher's weights if wanted."""
        trainer = self._trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        wanted = self.network is None or (fitting and self.init_from_teacher)
        if wanted and self.pretrained is None and self.teacher_source is not None and not self._initialised:
            self.take_from_teacher()
        super().configure_model()

    def take_from_teacher(self) -> None:
        """The architecture of the teacher where none is configured, its VAE, and with `init_from_teacher` its weights.

        Raises:
            UserError: the teacher is not one for this module, or of another architecture.
        """
        teacher = self.teacher
        source: DiffusionModule = teacher.module
        if self.class_conditional is None:
            self.class_conditional, self.num_classes = bool(source.class_conditional), source.num_classes
        if self.vae is None and self.vae_source is None and source.vae is not None:
            self.vae = FrozenVAE(source.vae.network)
        if self.network is None:
            arguments = {key: value for key, value in source.net.config.items() if not key.startswith("_")}
            network = type(source.net)(**arguments).to(source.net.device)
            self.network = prepare_network(network, self.num_classes if self.class_conditional else None)
        if self.init_from_teacher:
            one, two = ({"class": type(n).__name__, **plain_config(n)} for n in (source.net, self.network))
            if different := differences(one, two):
                raise UserError(
                    f"module.init_from_teacher: the teacher {self.teacher_source} is of another architecture: "
                    f"{first_of(different)}; module.network=null takes the teacher's"
                )
            self.network.load_state_dict(source.net.state_dict())
            if teacher.prediction.schedule.family == "edm":
                translate_times(self.network, teacher, self._schedule.t_min, self._schedule.t_max)
        self._initialised = True

    def load_pretrained(self, source: str | Path) -> None:
        """Take network, classes and noise levels from a diffusers pipeline folder or hub id of a consistency model.

        Raises:
            UserError: not such a folder, unreachable, damaged, or of another kind than configured.
        """
        self.pretrained = None
        read_consistency(source).apply_to(self)
        self._initialised = True

    @property
    def prediction(self) -> NoReturn:
        """UserError: samplers of diffusion models do not sample a consistency model."""
        raise UserError("a consistency model has no prediction type, so its sampler cannot be searched")

    def set_sampler(self, sampler: Any) -> None:
        """UserError for any sampler but None: a consistency model has its own."""
        if sampler is not None:
            self.prediction  # noqa: B018 - raises

    @property
    def _schedule(self) -> EDMSchedule:
        assert isinstance(self.noise_schedule, EDMSchedule)
        return self.noise_schedule

    def build_scheduler(self, scheduler: SchedulerChoice | None = None) -> Any:
        """A fresh CMStochasticIterativeScheduler of the noise levels; images in pixels are clipped in every step.

        Args:
            scheduler: None, or a partial of that class with options, such as num_train_timesteps.
        """
        from diffusers import CMStochasticIterativeScheduler

        options = dict(scheduler.keywords) if isinstance(scheduler, functools.partial) else {}
        choice = scheduler.func if isinstance(scheduler, functools.partial) else scheduler
        name = choice if isinstance(choice, str) else getattr(choice, "__name__", SCHEDULER)
        if name != SCHEDULER:
            raise ValueError(f"scheduler = {name!r} does not sample a consistency model; use {SCHEDULER}")
        own = {"num_train_timesteps": self.num_train_timesteps, "rho": self.rho}
        clip = self.vae is None and self.vae_source is None
        return CMStochasticIterativeScheduler(  # type: ignore[no-untyped-call]
            **{**own, **self._schedule.definition(), "clip_denoised": clip, **options}
        )

    def _generators(self, noise: Tensor, num_inference_steps: int) -> list[torch.Generator] | None:
        # one step draws nothing, and a generator for each sample takes longer than the step itself on a GPU
        return None if num_inference_steps == 1 else super()._generators(noise, num_inference_steps)

    def on_fit_start(self) -> None:
        """Check that the run can train this objective, before the first step."""
        if self.objective is None:
            raise UserError("module.objective is null: training needs one")
        if self.objective.keeps_target:
            refuse_shards(self.trainer, "module.objective.target_decay")
        self._distance  # noqa: B018 - one may lack its weights
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("module.objective needs the length of the training: set trainer.max_steps")
        self._total_steps = int(total)

    def loss(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """Training loss of images [B, C, H, W] in [-1, 1] and labels [B]; draws from torch's global generators."""
        objective = self.objective
        if objective is None:
            raise ValueError("module.objective is null: training needs one")
        x0 = images.float() if self.vae is None else self.vae.encode(images)
        schedule, (step, total) = self._schedule, self._progress
        sigma, sigma_next = objective.levels(len(x0), step, total, schedule.t_min, schedule.t_max, self.rho)
        noise = torch.randn_like(x0)
        x = x0 + expand(sigma, x0) * noise
        label = self._training_label(label)
        if objective.needs_teacher:
            x_next = heun_step(functools.partial(self.teacher.denoise, label=label), x, sigma, sigma_next)
        else:
            x_next = x0 + expand(sigma_next, x0) * noise
        target_network = self.target.of(self.net, self._compile) if self._has_target else self.net
        with repeatable(x.device, self.net) as replay:
            student = self.denoised(x, sigma, label)
            with torch.no_grad(), replay():
                target = self.denoised(x_next, sigma_next, label, target_network)
        weight = expand(objective.weight(sigma, sigma_next), x)
        return (weight.flatten() * self._distance(student, target)).mean()

    def denoised(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, network: Network | None = None) -> Tensor:
        """f(x, σ) [B, C, H, W] for noise levels [B] (float64, on the CPU) and labels [B].

        Args:
            network: instead of the student's.
        """
        called, style, schedule = network or self.net, self._style, self._schedule
        assert schedule.sigma_data is not None
        return consistency_function(
            lambda scaled, timestep: predict(called, style, scaled, timestep, label),
            x,
            sigma,
            schedule.sigma_data,
            schedule.t_min,
        )

    @functools.cached_property
    def _distance(self) -> Distance:
        return distance(self.distance)

    @property
    def _progress(self) -> tuple[int, int]:
        """(optimizer steps done, of how many); (0, 1) outside of a trainer."""
        return (0, 1) if self._trainer is None else (self.trainer.global_step, self._total_steps)

    @property
    def _has_target(self) -> bool:
        return self.objective is not None and self.objective.keeps_target

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """The optimizer's step, and after it the target's: μ target + (1 - μ) student."""
        super().optimizer_step(*args, **options)
        if self.objective is not None and self.objective.keeps_target and has_stepped(self.trainer):
            self.target.follow(self.net, self.objective.target_decay(*self._progress))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if (state := self.target.state()) is not None:
            checkpoint[TARGET] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.target = TargetNetwork(checkpoint.get(TARGET))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in DiffusionModule; a fit does not start from the teacher's weights after that."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._initialised = True
        return result
