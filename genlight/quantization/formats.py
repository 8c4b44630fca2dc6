"""What a layer is quantized to: bits, granularity, rounding. Plain frozen values, in a config and in a plan alike."""

from dataclasses import dataclass, field
from typing import Literal

from genlight.quantization.uniform import BITS, Numbers

FLOAT_BITS = 16


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of a layer is quantized. Its matrix is [outputs, inputs × kernel].

    Attributes:
        bits: 2 to 8, or 16 for a weight that stays in floating point.
        symmetric: whether zero has code 0; integer kernels are simplest so.
        granularity: what shares a scale: the whole weight, an output channel, or `group_size` consecutive inputs of
            one.
        group_size: inputs of a group, with granularity "group". It need not divide the inputs: the last group of a row
            is then shorter.
        rounding: "nearest", or "gptq", which needs a Hessian.
        clip: the range that is kept: all of it, or the part with the least squared error ("mse"), weighted by the
            diagonal of the Hessian ("hessian").
        act_order: GPTQ rounds the inputs with the largest Hessian first.
        damping: share of the mean of the Hessian's diagonal that GPTQ adds to it.
        numbers: what codes are, "integer" or, with eight bits, "float8" (e4m3), which is symmetric in any case.

    Raises:
        ValueError: a value outside what is said here.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    clip: Literal["none", "mse", "hessian"] = "none"
    act_order: bool = False
    damping: float = 0.01
    numbers: Numbers = "integer"

    def __post_init__(self) -> None:
        _check_bits("weight", self.bits, self.numbers)
        _check_choice("weight.granularity", self.granularity, ("tensor", "channel", "group"))
        _check_choice("weight.rounding", self.rounding, ("nearest", "gptq"))
        _check_choice("weight.clip", self.clip, ("none", "mse", "hessian"))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"weight.group_size = {self.group_size!r} must be given with weight.granularity = 'group', and only so"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"weight.group_size = {self.group_size} must be 1 or more")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"weight.damping = {self.damping!r} must lie in [0, 1]")

    @property
    def needs_hessian(self) -> bool:
        """Whether quantizing needs second moments of the layer's inputs."""
        return self.bits in BITS and (self.rounding == "gptq" or self.clip == "hessian")


@dataclass(frozen=True)
class ActivationFormat:
    """How the input of a layer is quantized.

    Attributes:
        bits: 2 to 8, or 16 for inputs that stay in floating point.
        symmetric: whether zero has code 0.
        mode: "dynamic" measures the range of each input; "static" takes it from calibration.
        granularity: what shares a scale. "token" is one row of the input of a linear layer, so that neither the batch
            nor another token changes a result; "sample" is one member of the batch; "tensor" is all. Static ranges are
            per tensor, possibly one for each sampling step and guidance branch.
        numbers: what codes are, as in `WeightFormat`.

    Raises:
        ValueError: a value outside what is said here.
    """

    bits: int = 8
    symmetric: bool = True
    mode: Literal["dynamic", "static"] = "dynamic"
    granularity: Literal["tensor", "sample", "token"] = "token"
    numbers: Numbers = "integer"

    def __post_init__(self) -> None:
        _check_bits("activation", self.bits, self.numbers)
        _check_choice("activation.mode", self.mode, ("dynamic", "static"))
        _check_choice("activation.granularity", self.granularity, ("tensor", "sample", "token"))
        if self.mode == "static" and self.granularity != "tensor":
            raise ValueError(
                f"activation.granularity = {self.granularity!r} must be 'tensor' where activation.mode is 'static': "
                "there is no range for tokens that were never seen"
            )


@dataclass(frozen=True)
class LayerFormat:
    """Weight and input of one layer."""

    weight: WeightFormat = field(default_factory=WeightFormat)
    activation: ActivationFormat = field(default_factory=ActivationFormat)


def _check_bits(name: str, bits: int, numbers: str) -> None:
    _check_choice(f"{name}.numbers", numbers, ("integer", "float8"))
    if isinstance(bits, bool) or (bits not in BITS and bits != FLOAT_BITS):
        raise ValueError(
            f"{name}.bits = {bits!r} must be {BITS[0]} to {BITS[-1]}, or {FLOAT_BITS} for floating point as it is"
        )
    if numbers == "float8" and bits in BITS[:-1]:
        raise ValueError(f"{name}.bits = {bits} must be 8 where {name}.numbers is 'float8', or {FLOAT_BITS}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(choices)}")
