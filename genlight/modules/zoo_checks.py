"""Whether members of a zoo can take turns within one sampling: one clear error for each way in which they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from genlight.errors import UserError
from genlight.modules.networks import differences, first_of
from genlight.modules.scheduled_denoiser import process_of

if TYPE_CHECKING:
    from genlight.modules.zoo import Member

# where the config of a network says how wide its text embeddings are; the first that is there counts: networks with
# captions have in cross_attention_dim a width of their own
_TEXT_WIDTHS = (
    "caption_channels",
    "joint_attention_dim",
    "text_dim",
    "text_embed_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
)
_POOLED_WIDTHS = ("pooled_projection_dim", "projection_class_embeddings_input_dim", "addition_embed_type")
_LATENT_STATISTICS = ("scaling_factor", "shift_factor", "latent_channels", "latents_mean", "latents_std")


def check_compatible(members: Sequence[Member]) -> None:
    """UserError that names two members and the first values in which they differ, if they cannot take turns."""
    for what, read, consequence in _CHECKS:
        stated = [(member, found) for member in members if (found := read(member)) is not None]
        for member, found in stated[1:]:
            first, wanted = stated[0]
            if different := differences(found, wanted):
                raise UserError(
                    f"members.{member.name} and members.{first.name} differ in {what}: {first_of(different)}; "
                    f"{consequence}"
                )
    _check_conversion(members)


def warn_of_same_weights(members: Sequence[Member]) -> None:
    """A warning for each two members whose weights are the same file, or equal files."""
    for one, two in combinations(members, 2):
        if one.folder is None or two.folder is None or _weights(one) != _weights(two):
            continue
        same = one.folder.resolve() == two.folder.resolve() and one.entry.variant == two.entry.variant  # type: ignore[union-attr]
        if same or one.sha256 == two.sha256:
            warnings.warn(
                f"members.{one.name} and members.{two.name} have the same weights: to choose between them changes "
                "nothing",
                stacklevel=2,
            )


def _weights(member: Member) -> list[int]:
    """Sizes of the weight files: other sizes, other weights."""
    assert member.folder is not None
    return sorted(file.stat().st_size for file in member.folder.glob("*.safetensors"))


def _latents(member: Member) -> dict[str, Any]:
    config = member.network.config
    channels, outputs = config.get("in_channels"), config.get("out_channels")
    size = config.get("sample_size")
    height_width = [size, size] if isinstance(size, int) else None if size is None else list(size)
    # twice the channels are the same and a variance
    return {
        "in_channels": channels,
        "out_channels": channels if outputs in (None, channels, 2 * (channels or 0)) else outputs,
        "sample_size": height_width,
    }


def _text(member: Member) -> dict[str, Any]:
    config = member.network.config
    width = next((config.get(key) for key in _TEXT_WIDTHS if config.get(key) is not None), None)
    pooled = {key: config.get(key) for key in _POOLED_WIDTHS if config.get(key) is not None}
    return {"text width": list(width) if isinstance(width, tuple) else width, **pooled}


def _autoencoder(member: Member) -> dict[str, Any] | None:
    return None if member.vae is None else {key: member.vae.get(key) for key in _LATENT_STATISTICS}


def _noise_schedule(member: Member) -> dict[str, Any] | None:
    return None if member.prediction is None else process_of(member.prediction.schedule)


def _classes(member: Member) -> dict[str, Any]:
    return {"num_classes": member.num_classes}


def _guidance(member: Member) -> dict[str, Any]:
    config = member.network.config
    return {
        "guidance_embeds": bool(config.get("guidance_embeds")),
        "time_cond_proj_dim": config.get("time_cond_proj_dim"),
    }


def _check_conversion(members: Sequence[Member]) -> None:
    """UserError where prediction types differ and one of them does not determine the others at the first step."""
    known = [member for member in members if member.prediction is not None]
    types = {member.prediction.prediction_type for member in known if member.prediction is not None}
    if len(types) < 2:
        return
    for member in known:
        prediction = member.prediction
        assert prediction is not None
        schedule = prediction.schedule
        if prediction.prediction_type == "epsilon" and schedule.alpha(schedule.t_max) == 0:
            other = next(m for m in known if m.prediction != prediction and m.prediction is not None)
            assert other.prediction is not None
            raise UserError(
                f"members.{member.name} predicts epsilon and members.{other.name} {other.prediction.prediction_type}: "
                f"at the first step of {schedule!r}, which is pure noise, the one cannot be turned into the other"
            )


_Reader = Callable[["Member"], Mapping[str, Any] | None]
_CHECKS: tuple[tuple[str, _Reader, str], ...] = (
    ("the shape of the noise", _latents, "members of a zoo take turns on one sample"),
    ("the text that they attend to", _text, "members of a zoo are given the same embeddings"),
    ("the classes that they know", _classes, "members of a zoo are given the same labels"),
    ("guidance", _guidance, "one is distilled with its guidance, and cannot take turns with one that is not"),
    ("the scale of the latents", _autoencoder, "a latent of the one is none of the other"),
    ("noise schedule", _noise_schedule, "at one timestep they expect other noise"),
)
