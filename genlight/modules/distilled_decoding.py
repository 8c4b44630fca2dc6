"""Distilled Decoding (Liu et al. 2024, arXiv 2412.17153): a student says at once what its teacher says token by token.

The teacher, an autoregressive network over the tokens of an image, becomes a function of noise by a flow from noise
vectors to codes. The student learns that function from pairs of noise and tokens, without images.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional

from genlight.diffusion.distances import Distance, distance
from genlight.errors import UserError, in_config
from genlight.modules.data_check import check_classes, check_images, check_precision
from genlight.modules.distilled_folder import save_student
from genlight.modules.generation import GeneratorValidation
from genlight.modules.learned_timesteps import LearnedTimesteps
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.token_folder import TokenTeacher, read_token_teacher
from genlight.nets.autoregressive import SamplingSettings, check_guidance_range
from genlight.nets.captions import texts_of
from genlight.nets.dd_student import Student, ToldStudent, student_of, take_from
from genlight.nets.few_step import Decoded, StudentNetwork, check_timesteps, ends_of, few_steps, mix
from genlight.nets.published import load_published
from genlight.recipes import fit_below_where_missing


class DistilledDecodingModule(GeneratorValidation, LearnedTimesteps, Optimization, LightningModule):
    """A student of an autoregressive network, trained to say all tokens from noise, or from noise and the first ones.

    Training shows the codes of the first groups and noise in the place of the others, and asks for the others: by
    cross-entropy, and by the squared error (or the perceptual distance of images) of the vectors that stand for them.
    What the published training weighs them with is not known; these are our own. Guidance is part of what the
    teacher's tokens are made with, so the student needs one pass: it knows the teacher's scale and no other, or with
    `guidance_range` is told one of the scales that its pairs were made with.

    The teacher is no submodule: neither trained, nor averaged, nor part of the checkpoint.

    Args:
        teacher: the folder of an autoregressive network, of its fit, or the folder or hub id of an ImageGPT of
            transformers; it decides the student's architecture.
        teacher_recipe: the experiment whose fit makes that folder where it is missing.
        timesteps: how many groups of tokens (tokens, or scales) are decided in what the student learns from,
            increasing from 0; each is as likely. Sampling in n steps uses the first n.
        num_inference_steps: passes of the student in sampling.
        split_timestep: in sampling, the groups from this one on are vectors in place of codes; null: all are codes.
            Vectors learned by squared error alone are means, and blurred.
        embedding_weight: of the squared error of vectors, beside the cross-entropy.
        perceptual_weight: of the LPIPS distance between images of the student's and of the pair's vectors; above 0 it
            needs the weights of VGG-16.
        init_from_teacher: begin with the teacher's weights.
        student_weights: safetensors of a published student, see `genlight.nets.published`, to begin with in their
            place; null: there are none.
        guidance_range: lowest and highest guidance scale that the student is told, those of the pairs; null: it is
            told none and learns the teacher's.
        guidance_scale: with a range, the scale of samples; null: the teacher's.
        optimizer, lr_scheduler: partials, as in DiffusionModule.
        compile: compile the student with ``torch.compile``.

    Raises:
        ValueError: timesteps that do not increase from 0, more steps than timesteps, a negative weight, or a guidance
            scale without a range.
        UserError: not 1 ≤ lowest ≤ highest guidance scale.
    """

    def __init__(
        self,
        teacher: str,
        *,
        teacher_recipe: str | None = None,
        timesteps: Sequence[int] = (0,),
        num_inference_steps: int = 1,
        split_timestep: int | None = None,
        embedding_weight: float = 0.5,
        perceptual_weight: float = 0.0,
        init_from_teacher: bool = True,
        student_weights: str | None = None,
        guidance_range: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.timesteps = check_timesteps(timesteps, max(timesteps, default=0) + 1, "module.timesteps")
        if not 1 <= num_inference_steps <= len(self.timesteps):
            raise ValueError(
                f"module.num_inference_steps = {num_inference_steps} must be from 1 to {len(self.timesteps)}, the "
                "number of module.timesteps"
            )
        if min(embedding_weight, perceptual_weight) < 0:
            raise ValueError(
                f"module.embedding_weight = {embedding_weight} and module.perceptual_weight = {perceptual_weight} must "
                "not be negative"
            )
        if guidance_scale is not None and guidance_range is None:
            raise ValueError(f"module.guidance_scale = {guidance_scale} needs module.guidance_range")
        with in_config("module"):
            self.guidance_range = None if guidance_range is None else check_guidance_range(guidance_range)
        self.guidance_scale = guidance_scale
        self.teacher_source, self.teacher_recipe = teacher, teacher_recipe
        self.num_inference_steps, self.split_timestep = num_inference_steps, split_timestep
        self.embedding_weight, self.perceptual_weight = embedding_weight, perceptual_weight
        self.init_from_teacher, self.student_weights = init_from_teacher, student_weights
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.network: Student | None = None
        self._compile = compile
        self._teacher: TokenTeacher | None = None
        self._perceptual: Distance | None = None

    def prepare(self, run_root: str | Path, cache: str | Path) -> None:
        """Fit the teacher by ``teacher_recipe`` below ``run_root`` if its folder is missing; see `genlight.recipes`."""
        if self.teacher_recipe is not None:
            fit_below_where_missing(self.teacher_recipe, self.teacher_source, "module.teacher", run_root, cache)

    @property
    def teacher(self) -> TokenTeacher:
        """The frozen teacher, read if need be, with its tokenizer on the module's device: training needs no more of it.

        Raises:
            UserError: it cannot be read, has fewer groups of tokens than ``timesteps`` or ``split_timestep`` say, or
                the guidance scale of samples is not in the range.
        """
        if self._teacher is None:
            teacher = read_token_teacher(self.teacher_source)
            groups = len(teacher.model.group_sizes)
            if self.timesteps[-1] >= groups:
                raise UserError(
                    f"module.timesteps = {list(self.timesteps)}, but the teacher {self.teacher_source} decides "
                    f"{groups} groups of tokens: all must be less"
                )
            if self.split_timestep is not None and not 0 <= self.split_timestep <= groups:
                raise UserError(f"module.split_timestep = {self.split_timestep} must be from 0 to {groups}")
            with in_config("module"):
                self._scale_of(teacher, None)
            self._teacher = teacher
        tokenizer = self._teacher.tokenizer
        if next(itertools.chain(tokenizer.parameters(), tokenizer.buffers())).device != self.device:
            tokenizer.to(self.device)
        return self._teacher

    @property
    def active_teacher(self) -> TokenTeacher:
        """`teacher` with its network on the module's device too, for passes of it."""
        teacher = self.teacher
        if next(teacher.model.transformer.parameters()).device != self.device:
            teacher.to(self.device)
        return teacher

    @property
    def settings(self) -> SamplingSettings:
        """The teacher's, with the guidance scale of this module's samples."""
        return replace(self.teacher.settings, guidance_scale=self._scale_of(self.teacher, None))

    def _scale_of(self, teacher: TokenTeacher, guidance_scale: float | None) -> float:
        """The guidance scale of samples where `guidance_scale` is asked for; ValueError if it was not learned."""
        if self.guidance_range is None:
            own = teacher.settings.guidance_scale
            if guidance_scale is not None and guidance_scale != own:
                raise ValueError(f"guidance_scale = {guidance_scale}: the student has learned {own} and knows no other")
            return own
        default = teacher.settings.guidance_scale if self.guidance_scale is None else self.guidance_scale
        scale = default if guidance_scale is None else guidance_scale
        low, high = self.guidance_range
        if not low <= scale <= high:
            raise ValueError(
                f"guidance_scale = {scale} must be from {low} to {high}, the range that the student learns"
            )
        return float(scale)

    @property
    def student(self) -> Student:
        """The network, built if need be."""
        if self.network is None:
            self.configure_model()
        assert self.network is not None
        return self.network

    def configure_model(self) -> None:
        """Build the student from what the teacher is, once."""
        if self.network is not None:
            return
        # Lightning calls this where all that is built lies on its device at once, the teacher that is read here too
        teacher = self.active_teacher
        try:
            network = student_of(teacher.model, self.guidance_range)
            if self.init_from_teacher and self.student_weights is None:
                take_from(network, teacher.model)
        except ValueError as error:
            raise UserError(f"module.teacher = {self.teacher_source}: {error}") from error
        if self.student_weights is not None:
            with in_config("module.student_weights"):
                load_published(network, self.student_weights)
        self.network = network.to(self.device)
        if self._compile:
            self.network.compile()  # in place: the names in the state dict stay

    @property
    def sample_shape(self) -> tuple[int, int]:
        """(N, C) of the noise of one sample: a vector for each token."""
        return self.teacher.noise_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.teacher.image_shape

    def check_data(self, datamodule: Any) -> None:
        """UserError naming both config keys and values if the data does not fit the teacher."""
        where = "module.teacher"
        check_images(datamodule, self.image_shape, f"the channels of {where}", f"the image size of {where}")
        check_classes(datamodule, self.teacher.num_classes, f"the number of classes of {where}")
        found = getattr(getattr(datamodule, "settings", None), "guidance_range", None)
        if found != self.guidance_range:
            raise UserError(
                f"data.guidance_range = {_shown(found)}, but module.guidance_range = {_shown(self.guidance_range)}: "
                "set them equal"
            )
        source = getattr(datamodule, "teacher_source", self.teacher_source)
        # another folder may hold the same networks, which is told by reading them
        if source != self.teacher_source and datamodule.teacher.fingerprint != self.teacher.fingerprint:
            raise UserError(
                "data.teacher and module.teacher are different networks: the pairs of one do not teach the other; set "
                "data.teacher to ${module.teacher}"
            )

    def setup(self, stage: str) -> None:
        """UserError where the trainer would hold noise and codes in other numbers than those that decide tokens."""
        check_precision(self.trainer, "the numbers that decide the teacher's tokens")

    def on_fit_start(self) -> None:
        """Read the weights of the perceptual distance before the first step, if it has a weight."""
        if self.perceptual_weight > 0:
            self._perceptual = distance("lpips")

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int = 0) -> Tensor:
        losses = self.losses(batch["noise"], batch["tokens"], batch["label"], batch.get("guidance"))
        total = losses["cross_entropy"] + self.embedding_weight * losses["embedding"]
        if "perceptual" in losses:
            total = total + self.perceptual_weight * losses["perceptual"]
        size = len(batch["noise"])
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=size)
        return total

    def losses(self, noise: Tensor, tokens: Tensor, label: Tensor, guidance: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of the loss, and the share of tokens that are right, over places that are not decided yet.

        Args:
            noise: [B, N, C].
            tokens: [B, N] int64, the teacher's from this noise.
            label: [B], classes or numbers of captions. Draws the timesteps from torch's global generator.
            guidance: [B], the guidance scale of each, of a student that is told it.
        """
        codebook, ends = self.teacher.model.codebook, ends_of(self.student.group_sizes)
        decided = torch.tensor([ends[timestep] for timestep in self.timesteps])
        decided = decided[torch.randint(len(self.timesteps), (len(noise),))].to(noise.device)
        is_data = torch.arange(noise.shape[1], device=noise.device) < decided[:, None]
        captions = self.teacher.captions
        label = label if captions is None else texts_of(captions, label)
        told = () if guidance is None else (guidance,)
        logits, vectors = self.student(mix(noise, tokens, codebook, is_data), is_data, label, *told)
        is_open = ~is_data
        codes = functional.embedding(tokens, codebook)
        losses = {
            "cross_entropy": functional.cross_entropy(logits[is_open], tokens[is_open]),
            "embedding": (vectors - codes)[is_open].square().mean(),
            "agreement": (logits.detach().argmax(-1) == tokens)[is_open].float().mean(),
        }
        if self._perceptual is not None:
            decoder = self.teacher.tokenizer
            made = decoder.decode_vectors(torch.where(is_data[..., None], codes, vectors))
            losses["perceptual"] = self._perceptual(made, decoder.decode_vectors(codes)).mean()
        return losses

    def decode_noise(
        self,
        noise: Tensor,
        label: Tensor | None,
        *,
        timesteps: Sequence[int] | None = None,
        split_timestep: int | None = None,
        guidance_scale: float | None = None,
    ) -> Decoded:
        """Tokens and vectors of noise [B, N, C] and labels or texts; arguments as in :meth:`sample`."""
        label = self._checked(label, len(noise), noise.device)
        told = self.told_student(guidance_scale)
        student, training = self.student, self.student.training
        student.eval()
        try:
            return few_steps(
                told,
                self.teacher.model.codebook,
                noise,
                label,
                self.sampling_timesteps() if timesteps is None else self.learned(timesteps),
                self.split_timestep if split_timestep is None else split_timestep,
            )
        finally:
            student.train(training)

    def _checked(self, label: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Labels or texts that the student knows; of a teacher without classes there is one label."""
        classes = self.teacher.num_classes
        if label is None:
            if classes is not None:
                raise ValueError("label: sampling a class-conditional module needs labels")
            return torch.zeros(count, dtype=torch.long, device=device)
        if label.is_floating_point():
            if self.teacher.captions is None:
                raise ValueError("label must be whole numbers: the student knows no texts")
        elif len(label) and not 0 <= int(label.min()) <= int(label.max()) < (classes or 1):
            raise ValueError(f"label must be from 0 to {(classes or 1) - 1}")
        return label

    def told_student(self, guidance_scale: float | None = None) -> StudentNetwork:
        """The student at a guidance scale; None: that of the module's samples.

        Raises:
            ValueError: a scale that was not learned.
        """
        scale = self._scale_of(self.teacher, guidance_scale)
        return ToldStudent(self.student, None if self.guidance_range is None else scale, self.teacher.captions)

    @contextmanager
    def with_student(self, student: Student) -> Iterator[None]:
        """Another network in the student's place for a while, such as the same one in few bits."""
        own = self.student
        if next(student.parameters()).device != self.device:
            student.to(self.device)
        self.network = student
        try:
            yield
        finally:
            self.network = own

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor | None = None, **options: Any) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from noise [B, *sample_shape] and labels [B].

        Args:
            label: classes, or numbers of the teacher's captions; a student of texts also takes the features of any
                texts, [B, T, D].
            options: ``timesteps``, groups that are decided before each pass; ``split_timestep``, the first group whose
                vectors are used as they are; ``guidance_scale``, which must be in the range that was learned, or
                the teacher's. Defaults: the module's.

        Raises:
            ValueError: no labels of a teacher of classes, a label that is not known, timesteps that were not learned,
                or another guidance scale.
        """
        return self.images_of(self.decode_noise(noise, label, **options))

    @torch.no_grad()
    def images_of(self, decoded: Decoded) -> Tensor:
        """Images [B, C, H, W] in [-1, 1]."""
        return self.teacher.tokenizer.decode_vectors(decoded.vectors).clamp(-1, 1)

    def description(self) -> dict[str, Any]:
        """What the weights mean, as plain values: the student's architecture and whose student it is."""
        described: dict[str, Any] = json.loads(json.dumps(self.student.config))
        return {"student": described, "teacher": self.teacher.fingerprint}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        self.student  # noqa: B018 - may still have to be built
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that samples with torch alone; see :mod:`genlight.modules.distilled_folder`."""
        save_student(self, Path(folder))


def _shown(guidance_range: tuple[float, float] | None) -> str:
    return "null" if guidance_range is None else str(list(guidance_range))
