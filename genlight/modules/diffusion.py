"""Diffusion models: any diffusers network, trained on one noise schedule and sampled by a diffusers scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from genlight.diffusion.noise_schedules import NoiseSchedule, expand
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.timestep_samplers import TimestepSampler, UniformTimesteps
from genlight.diffusion.weightings import Uniform, Weighting
from genlight.errors import UserError
from genlight.modules.artifact_kind import check_one_model
from genlight.modules.data_check import check_data
from genlight.modules.described import DescribedWeights
from genlight.modules.exported_pipeline import Network, denoise, network_shape, network_style, predict
from genlight.modules.generation import GeneratorValidation
from genlight.modules.latents import FrozenVAE
from genlight.modules.networks import (
    check_state_dict,
    label_rows,
    noise_seeded_generators,
    plain_config,
    prepare_network,
)
from genlight.modules.optimization import Optimization
from genlight.modules.searched_sampling import SearchedSampling

SchedulerChoice = str | type | functools.partial[Any]


class DiffusionModule(SearchedSampling, GeneratorValidation, DescribedWeights, Optimization, LightningModule):
    """A generator: network, noise schedule, loss and sampler. Works in pixels, or in the latent space of a VAE.

    The loss of a sample is w(t) times the mean squared error of the network against its target, with the input, the
    target and w from ``genlight.diffusion`` (EDM preconditioning with prediction_type "edm").

    Args:
        network: UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel; None takes that of ``pretrained``.
        noise_schedule: the process x_t = alpha(t) x_0 + sigma(t) eps; None takes that of ``pretrained``.
        prediction_type: "epsilon", "v_prediction", "sample", "flow" or "edm"; None takes that of ``pretrained``.
        loss_weighting: weights of the loss over time; uniform if None.
        timestep_sampler: the times that training looks at; uniform if None.
        optimizer: called with the trainable parameters.
        lr_scheduler: called with the optimizer; steps with it. If it takes ``total_steps`` and that is not given, it
            gets the length of the training.
        scheduler: the diffusers scheduler to sample with: a class name, a class, or a partial with options. Noise
            schedule and prediction type are filled in. None: that of ``pretrained``, else DDIM.
        num_inference_steps: steps of the sampler. None: as ``pretrained`` was saved with, else 50.
        guidance_scale: classifier-free guidance; 1 samples the plain conditional model at half the cost. None: as
            ``pretrained`` was saved with, else 1.
        class_conditional: give the network the label. None: yes if ``pretrained`` has classes.
        num_classes: classes of the data; the null class has this index. Ignored when not class-conditional.
        label_dropout: probability of training on the null class, which guidance needs.
        vae: a diffusers autoencoder, or the folder or hub id of one; frozen and not part of the checkpoint.
        compile: compile the network with ``torch.compile``.
        pretrained: a diffusers pipeline folder or hub id to start from; read in ``configure_model``.

    Raises:
        ValueError, TypeError: arguments that do not fit each other, naming the config key.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        noise_schedule: NoiseSchedule | None = None,
        prediction_type: str | None = None,
        *,
        loss_weighting: Weighting | None = None,
        timestep_sampler: TimestepSampler | None = None,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        scheduler: SchedulerChoice | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = 1.0,
        class_conditional: bool | None = False,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
        vae: nn.Module | str | None = None,
        compile: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.class_conditional = class_conditional
        self.num_classes = num_classes if class_conditional is not False else None
        self.label_dropout = label_dropout
        self.guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self.num_inference_steps = 50 if num_inference_steps is None else num_inference_steps
        stated = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.taken_from_folder = tuple(name for name, value in stated.items() if value is None)
        self.scheduler: SchedulerChoice | None = scheduler
        self.noise_schedule = noise_schedule
        self.prediction_type = prediction_type
        self.loss_weighting = loss_weighting or Uniform()
        self.timestep_sampler = timestep_sampler or UniformTimesteps()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.pretrained = pretrained
        self.vae_source = vae if isinstance(vae, str) else None
        self.vae = FrozenVAE(vae) if isinstance(vae, nn.Module) else None
        self.class_names: list[str] | None = None
        self.network: Network | None = None
        self._check_arguments()
        self._compile = compile
        self._compiled = False
        self._require("network", network)
        if network is not None:
            self.network = prepare_network(network, self.num_classes if class_conditional else None)
            self._check_guidance()
        if noise_schedule is not None and prediction_type is not None:
            Prediction(prediction_type, noise_schedule)
            if pretrained is None:
                self.build_scheduler()

    def _require(self, key: str, value: Any) -> None:
        if value is None and self.pretrained is None:
            raise ValueError(f"module.{key} is null: set it, or module.pretrained to a folder that decides it")

    def _check_arguments(self) -> None:
        for key in ("noise_schedule", "prediction_type", "class_conditional"):
            self._require(key, getattr(self, key))
        if self.class_conditional and self.num_classes is None and self.pretrained is None:
            raise ValueError(
                "module.class_conditional is true, but module.num_classes is null: the data has no classes"
            )
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError(f"module.label_dropout must be in [0, 1), got {self.label_dropout}")
        if self.num_inference_steps < 1:
            raise ValueError(f"module.num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.guidance_scale != 1.0 and self.class_conditional is False:
            raise ValueError(f"module.guidance_scale = {self.guidance_scale} needs module.class_conditional=true")

    def configure_model(self) -> None:
        """Read ``pretrained`` and the VAE, and compile, once; called by Lightning and by whatever needs the network."""
        if self.pretrained is not None:
            source, self.pretrained = self.pretrained, None
            try:
                check_one_model(source)
                self.load_pretrained(source)
            except BaseException:
                self.pretrained = source
                raise
        if self.vae_source is not None:
            from genlight.modules.pretrained import load_autoencoder

            self.vae, self.vae_source = FrozenVAE(load_autoencoder(self.vae_source)), None
        if self._compile and not self._compiled:
            self.net.compile()  # in place: the names in the state dict stay
            self._compiled = True

    def load_pretrained(self, source: str | Path) -> None:
        """Take network, noise schedule, prediction type and VAE from a diffusers pipeline folder or hub id.

        What the module was configured with must agree; what it lacks is taken from there. Weights are read as
        safetensors, classes come from diffusers, no code of the folder runs.

        Raises:
            UserError: not a pipeline folder, unreachable, damaged, or of another kind than configured: the message
                names the first keys that differ.
        """
        from genlight.modules.pretrained import read_pipeline

        self.pretrained = None
        try:
            read_pipeline(source).apply_to(self)
            self._check_arguments()
            self._check_guidance()
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error

    @property
    def net(self) -> Network:
        """The network, built if need be."""
        if self.network is None:
            self.configure_model()
        assert self.network is not None
        return self.network

    @property
    def prediction(self) -> Prediction:
        """Prediction type and noise schedule as one object."""
        self.net  # noqa: B018 - a pretrained folder may decide both
        assert self.prediction_type is not None and self.noise_schedule is not None
        return Prediction(self.prediction_type, self.noise_schedule)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise of one sample: of the latents where there is a VAE."""
        return network_shape(self.net)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.sample_shape
        self.configure_model()
        if self.vae is None:
            return channels, height, width
        return self.vae.image_channels, height * self.vae.downscale, width * self.vae.downscale

    def build_scheduler(self, scheduler: SchedulerChoice | None = None) -> Any:
        """A fresh diffusers scheduler that fits the noise schedule and the prediction type."""
        choice = scheduler or self.scheduler or "DDIMScheduler"
        schedule, prediction_type = self.noise_schedule, self.prediction_type
        assert schedule is not None and prediction_type is not None
        options: dict[str, Any] = {}
        if isinstance(choice, functools.partial):
            options = choice.keywords
            choice = cast(type, choice.func)
        return build_scheduler(choice, schedule, prediction_type, **options)

    def check_data(self, datamodule: Any) -> None:
        """UserError naming both config keys and values if the data does not fit the network."""
        check_data(self, datamodule)
        names = getattr(datamodule, "class_names", None)
        self.class_names = [str(name) for name in names] if names else None

    def _check_guidance(self) -> None:
        if not self.class_conditional or label_rows(self.net) != self.num_classes:
            return
        for key, plain in (("label_dropout", 0.0), ("guidance_scale", 1.0)):
            if getattr(self, key) != plain:
                raise ValueError(
                    f"module.{key} = {getattr(self, key)} needs a null class, but module.network.num_class_embeds = "
                    f"{self.num_classes} has none: add a row, or set {key}={plain:g}"
                )

    def check_guidance(self, scale: float) -> None:
        """ValueError if the network cannot be guided with this scale."""
        if scale != 1.0 and (not self.class_conditional or label_rows(self.net) == self.num_classes):
            raise ValueError(f"guidance_scale = {scale} needs a class-conditional module with a null class")

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        loss = self.loss(batch["image"], batch.get("label"))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def loss(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """Training loss of images [B, C, H, W] in [-1, 1] and labels [B]; draws from torch's global generators."""
        x0 = images.float() if self.vae is None else self.vae.encode(images)
        prediction, schedule = self.prediction, self.noise_schedule
        assert schedule is not None
        # times stay on the CPU: the range checks of the schedule would otherwise wait for the device at every step
        t = self.timestep_sampler.sample(schedule, len(x0))
        noise = torch.randn_like(x0)
        x_t = schedule.add_noise(x0, noise, t)
        timestep = schedule.model_timestep(t).float().to(x_t.device)
        output = self.predict(expand(schedule.input_scale(t), x_t) * x_t, timestep, self._training_label(label))
        error = (output - prediction.target(x0, noise, t)).square().flatten(1).mean(1)
        return (expand(self.loss_weighting.weight(prediction, t), error) * error).mean()

    def predict(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's output in float32 for scaled input [B, C, H, W], without the learned variance."""
        return predict(self.net, self._style, x, timestep, label)

    @functools.cached_property
    def _style(self) -> str:
        return network_style(self.net)

    def _training_label(self, label: Tensor | None) -> Tensor | None:
        if not self.class_conditional:
            return None
        if label is None:
            raise UserError("module.class_conditional is true, but the batches of the data have no label")
        if self.label_dropout == 0.0:
            return label
        dropped = (torch.rand(len(label)) < self.label_dropout).to(label.device)
        assert self.num_classes is not None
        return torch.where(dropped, self.num_classes, label)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        self.net  # noqa: B018 - may still have to be read
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def sample(self, noise: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from unit noise [B, *sample_shape]; options as in :meth:`sample_latents`."""
        samples = self.sample_latents(noise, label, **options)
        images = samples if self.vae is None else self.vae.decode(samples)
        return images.clamp(-1.0, 1.0)

    @torch.no_grad()  # not inference_mode: tensors that the noise schedule caches are used in training again
    def sample_latents(
        self,
        noise: Tensor,
        label: Tensor | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: SchedulerChoice | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Samples of the network [B, *sample_shape], neither decoded nor clipped; the network runs in eval mode.

        Args:
            label: class of each sample [B]; needed if class-conditional.
            num_inference_steps, guidance_scale, scheduler: instead of those of the module. Steps or a scheduler given
                here also take the place of a sampler that was set.
            generator: for schedulers that add noise; by default one per sample, seeded by its own noise, so that a
                sample does not depend on the batch it is in.
        """
        self.configure_model()
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if self.class_conditional and label is None:
            raise ValueError("sampling a class-conditional module needs labels")
        self.check_guidance(scale)
        own = num_inference_steps is None and scheduler is None
        with _evaluating(self.net):
            if self.sampler is not None and own:
                return self.sample_with_sampler(noise, label if self.class_conditional else None, scale)
            steps = num_inference_steps or self.num_inference_steps
            generator = self._generators(noise, steps) if generator is None else generator
            return denoise(
                self.net,
                self._style,
                self.build_scheduler(scheduler),
                noise,
                label if self.class_conditional else None,
                num_inference_steps=steps,
                guidance_scale=scale,
                null_label=self.num_classes,
                generator=generator,
            )

    def _generators(self, noise: Tensor, num_inference_steps: int) -> list[torch.Generator] | None:
        """What a scheduler draws further noise from."""
        return noise_seeded_generators(noise)

    def description(self) -> dict[str, Any]:
        """What the weights mean, as plain values: network, noise schedule, prediction type, classes, VAE."""
        network, schedule = self.net, self.noise_schedule
        assert schedule is not None
        self.configure_model()
        vae = None if self.vae is None else self.vae.network
        return {
            "network": {"class": type(network).__name__, "config": plain_config(network)},
            "noise_schedule": {"family": schedule.family, **schedule.definition()},
            "prediction_type": self.prediction_type,
            "num_classes": self.num_classes,
            "vae": None if vae is None else {"class": type(vae).__name__, "config": plain_config(vae)},
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a diffusers pipeline folder; see :mod:`genlight.modules.export` for the kind of pipeline."""
        from genlight.modules.export import save_pipeline

        self.configure_model()
        save_pipeline(self, Path(folder))


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
