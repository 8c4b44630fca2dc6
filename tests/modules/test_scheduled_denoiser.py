"""Who answers, when, in which prediction type, and where the others wait."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, expand
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample
from genlight.errors import UserError
from genlight.modules.scheduled_denoiser import ScheduledDenoiser, time_of_timestep

VP, FLOW = VPSchedule(), FlowSchedule()
SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPSchedule("linear"),
    "edm": EDMSchedule(),
    "flow": FlowSchedule(shift=3.0),
}
TYPES = {"vp": ("epsilon", "v_prediction", "sample"), "edm": ("edm", "v_prediction"), "flow": ("flow", "epsilon")}


class Constant(nn.Module):
    """Answers with one number everywhere, in the form of a diffusers network."""

    def __init__(self, value: float, size: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.zeros(size, dtype=dtype))
        self.config = {"in_channels": 1, "out_channels": 1, "value": value}
        self.given: list[Any] = []
        self.contexts: list[str] = []

    def forward(self, sample: Tensor, timestep: Any, extra: Any = None, return_dict: bool = True) -> Any:
        self.given.append((sample, timestep, extra))
        output = torch.full_like(sample, self.value)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.contexts.append(name)
        yield


def zoo(**options: Any) -> ScheduledDenoiser:
    return ScheduledDenoiser({"small": Constant(1.0, 1), "large": Constant(3.0, 9), "mid": Constant(2.0, 4)}, **options)


def said(denoiser: nn.Module, timestep: Any) -> float:
    answer = denoiser(torch.zeros(2, 1, 4, 4), timestep).sample
    assert answer.unique().numel() == 1
    return float(answer.flatten()[0])


def test_the_value_of_the_timestep_chooses_whatever_the_order_and_number_of_calls() -> None:
    denoiser = zoo()
    assert denoiser.primary == "large" and said(denoiser, 3) == 3.0
    denoiser.set_schedule([900.0, 500.5, 100.25, 3.0], ["small", "large", "mid", "small"])
    denoiser.calls.clear()
    expected = {
        900: 1.0,
        700.2: 3.0,
        700.3: 1.0,
        500: 3.0,
        300.4: 3.0,
        300.3: 2.0,
        100: 2.0,
        51.6: 1.0,
        0: 1.0,
        999: 1.0,
    }
    times = [time for time in expected for _ in range(2)]  # twice in a step, as guidance may
    random.Random(0).shuffle(times)
    for time in times:
        assert said(denoiser, torch.tensor(float(time))) == expected[time]
        assert said(denoiser, torch.full((2,), float(time))) == expected[time]
    wanted = {
        name: 4 * list(expected.values()).count(value) for name, value in (("small", 1), ("large", 3), ("mid", 2))
    }
    assert denoiser.calls == wanted
    with denoiser.primary_only():
        assert said(denoiser, 900) == 3.0
    with denoiser.primary_only(False):
        assert said(denoiser, 900) == 1.0
    denoiser.set_schedule(None)
    assert said(denoiser, 900) == 3.0 and not denoiser.schedule


def test_switches_are_counted_between_calls() -> None:
    denoiser = zoo()
    denoiser.set_schedule([4, 3, 2, 1], ["small", "small", "large", "small"])
    for time in (4, 4, 3, 3, 2, 2, 1, 1):
        said(denoiser, time)
    assert denoiser.switches == 2 and denoiser.calls == {"small": 6, "large": 2}


def test_a_nan_member_is_met_exactly_where_it_is_scheduled() -> None:
    schedule = VPSchedule("linear")
    table = compile_schedule(named_schedule("dpm_2s", schedule, 6), schedule)
    times = schedule.model_timestep(table.times).tolist()
    for place in range(len(times)):
        denoiser = ScheduledDenoiser({"fine": Constant(0.1, 9), "nan": Constant(float("nan"))})
        denoiser.set_schedule(times, ["nan" if index == place else "fine" for index in range(len(times))])
        steps: list[bool] = []

        def model(x: Tensor, timestep: Tensor, denoiser: Any = denoiser, steps: list[bool] = steps) -> Tensor:
            answer: Tensor = denoiser(x, timestep, return_dict=False)[0]
            steps.append(bool(answer.isnan().any()))
            return answer

        sample(model, torch.randn(2, 1, 4, 4), table, Prediction("epsilon", schedule))
        assert steps.index(True) == place and denoiser.calls["nan"] == 1


def test_the_member_that_raised_is_known() -> None:
    denoiser = zoo()
    denoiser.set_schedule([900.0, 100.0], ["small", "mid"])

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("gone")

    denoiser.members["mid"].forward = broken  # type: ignore[method-assign]
    assert said(denoiser, 900) == 1.0 and denoiser.failed is None
    with pytest.raises(RuntimeError, match="gone"):
        said(denoiser, 100)
    assert denoiser.failed == "mid"
    denoiser.failed = None
    # what is wrong with a call is no member's fault
    with pytest.raises(ValueError, match="one member answers for all"):
        denoiser(torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 2.0]))
    assert denoiser.failed is None


def test_samples_of_several_timesteps_and_missing_ones_are_refused() -> None:
    denoiser = zoo()
    with pytest.raises(ValueError, match="all samples of a call need the same"):
        denoiser(torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="timestep is missing"):
        denoiser(torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("times", "names", "message"),
    [
        ([1.0], [], "0 names for 1 timesteps"),
        ([1.0], ["huge"], r"names\[0\] = 'huge' is not among the members small, large, mid"),
        ([1.0, float("nan")], ["small", "mid"], r"timesteps\[1\] = nan"),
        ([1.0, 1.0], ["small", "mid"], r"timesteps\[1\] = 1 has two members, 'small' and 'mid'"),
    ],
)
def test_schedules_that_do_not_fit(times: list[float], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo().set_schedule(times, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "members"),
        ({"members": {" ": Constant(1)}}, "members"),
        ({"primary": "huge"}, "primary = 'huge'"),
        ({"resident": 0}, "resident = 0"),
        ({"predictions": {"huge": Prediction("epsilon", VPSchedule())}}, "predictions.huge"),
        (
            {"predictions": {"a": Prediction("epsilon", VPSchedule()), "b": Prediction("v_prediction", VPSchedule())}},
            "predictions.c is missing",
        ),
        (
            {"predictions": {"a": Prediction("flow", FLOW), **dict.fromkeys("bc", Prediction("epsilon", VP))}},
            "one noise schedule",
        ),
    ],
)  # fmt: skip
def test_members_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduledDenoiser(**{"members": {name: Constant(1) for name in "abc"}, **options})


def test_members_of_several_prediction_types_may_differ_in_the_shift_of_flow_matching() -> None:
    predictions = {"a": Prediction("flow", FLOW), "b": Prediction("epsilon", FlowSchedule(shift=3.0))}
    assert ScheduledDenoiser({name: Constant(1) for name in "ab"}, predictions=predictions).predictions == predictions


class Ideal(nn.Module):
    """The ideal network of data N(mean, std²) in its own prediction type, for scaled inputs as diffusers gives them."""

    def __init__(self, prediction: Prediction, size: int, mean: float = 0.3, std: float = 0.7) -> None:
        super().__init__()
        self.prediction, self.mean, self.std = prediction, mean, std
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        schedule, kind = self.prediction.schedule, self.prediction.prediction_type
        t = time_of_timestep(schedule, float(timestep))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = sample / expand(schedule.input_scale(t), sample)
        eps = sigma * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x0 = self.mean + alpha * self.std**2 * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        if kind == "edm":
            assert schedule.sigma_data is not None
            total = (sigma**2 + schedule.sigma_data**2) ** 0.5
            skip = schedule.sigma_data**2 / total**2
            return ((x0 - skip * x_t) / (sigma * schedule.sigma_data / total),)
        root = (alpha**2 + sigma**2) ** 0.5
        outputs = {"epsilon": eps, "sample": x0, "flow": eps - x0, "v_prediction": (alpha * eps - sigma * x0) / root}
        return (outputs[kind],)


@pytest.mark.parametrize("family", TYPES)
def test_members_of_other_prediction_types_say_what_the_primary_would(family: str) -> None:
    schedule = SCHEDULES[family]
    predictions = {kind: Prediction(kind, schedule) for kind in TYPES[family]}
    members = {kind: Ideal(prediction, 1) for kind, prediction in predictions.items()}
    generator = torch.Generator().manual_seed(0)
    for primary in members:
        denoiser = ScheduledDenoiser(members, primary, predictions)
        for fraction in torch.rand(20, generator=generator).clamp(0.02, 0.98).tolist():
            timestep = schedule.model_timestep(schedule.t_of_fraction(fraction))
            x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
            for name in members:
                denoiser.set_schedule([timestep], [name])
                found, expected = (net(x, torch.tensor(timestep).double())[0] for net in (denoiser, members[primary]))
                assert (found - expected).abs().max() <= 1e-6 * (1 + expected.abs().max()), (primary, name, fraction)


def test_model_timesteps_have_the_inverse_that_is_used() -> None:
    for schedule in SCHEDULES.values():
        for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
            t = schedule.t_of_fraction(fraction)
            assert time_of_timestep(schedule, schedule.model_timestep(t)) == pytest.approx(t, rel=1e-9, abs=1e-12)


def unet(outputs: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(width)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=outputs,
        layers_per_block=1,
        block_out_channels=(width, width),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).to(dtype)


def test_a_learned_variance_is_dropped_only_where_members_differ_in_it() -> None:
    x, time = torch.randn(2, 1, 8, 8), torch.tensor(5)
    plain, learned, other = unet(1, 8).eval(), unet(2, 16).eval(), unet(2, 8).eval()
    mixed = ScheduledDenoiser({"plain": plain, "learned": learned}).eval()
    assert mixed.primary == "learned" and mixed.config.out_channels == 1 and learned.config.out_channels == 2
    assert mixed.config.block_out_channels == learned.config.block_out_channels
    with torch.no_grad():
        assert torch.equal(mixed(x, time).sample, learned(x, time).sample[:, :1])
        mixed.set_schedule([5], ["plain"])
        assert torch.equal(mixed(x, time).sample, plain(x, time).sample)
        same = ScheduledDenoiser({"other": other, "learned": learned}).eval()
        assert torch.equal(same(x, time, return_dict=False)[0], learned(x, time).sample)
    assert same.config.out_channels == 2


def test_a_variance_stays_as_it_is_where_the_mean_is_converted() -> None:
    schedule = VPSchedule("linear")
    kinds = {"epsilon": Prediction("epsilon", schedule), "v": Prediction("v_prediction", schedule)}
    members = {"epsilon": unet(2, 16).eval(), "v": unet(2, 8).eval()}
    denoiser = ScheduledDenoiser(members, predictions=kinds)
    denoiser.set_schedule([300], ["v"])
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        found, own = denoiser(x, 300).sample, members["v"](x, 300).sample
    alpha, sigma = schedule.alpha(300.0), schedule.sigma(300.0)
    assert torch.equal(found[:, 1:], own[:, 1:])
    assert torch.allclose(found[:, :1], alpha * own[:, :1] + sigma * x, atol=1e-5)


class Tracked(Constant):
    """Knows where it is without being there."""

    place = "cpu"

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield nn.Parameter(torch.empty(1, device=self.place))

    def to(self, device: Any) -> "Tracked":  # type: ignore[override]
        self.place = str(device)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Tracked":
        self.place = str(fn(torch.empty(1)).device)
        return self


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_no_more_than_so_many_members_are_on_the_device_and_the_least_recent_goes(resident: int) -> None:
    members = {name: Tracked(float(index)) for index, name in enumerate("abcd")}
    denoiser = ScheduledDenoiser(members, "b", resident=resident).to("meta")
    assert members["b"].place == "meta" and denoiser.device.type == "meta"
    assert [member.place for member in members.values()].count("meta") == resident
    denoiser.set_schedule([3, 2, 1, 0], list("dcba"))
    recent, moves = [name for name in "bacd"][:resident][::-1], 0
    rng = random.Random(resident)
    for _ in range(200):
        name = rng.choice("abcd")
        assert said(denoiser, "abcd".index(name)) == "abcd".index(name)
        moves += name not in recent
        recent = [*(other for other in recent if other != name), name][-resident:]
        assert {other for other, member in members.items() if member.place == "meta"} == set(recent)
    assert denoiser.moves == moves and denoiser.device.type == "meta"
    denoiser.to("cpu")
    assert denoiser.device.type == "cpu" and {member.place for member in members.values()} == {"cpu"}


def test_members_that_wait_are_where_they_were_and_are_cast_there() -> None:
    members = {name: Tracked(float(index)) for index, name in enumerate("abc")}
    members["b"].place = "meta"
    denoiser = ScheduledDenoiser(members, "b", resident=2)
    denoiser.set_schedule([0, 2], ["a", "c"])
    assert said(denoiser, 0) == 0 and denoiser.moves == 1 and members["b"].place == members["a"].place == "meta"
    assert said(denoiser, 2) == 2 and denoiser.moves == 2 and members["b"].place == "cpu"
    for member in members.values():
        member.place = "meta"
    ScheduledDenoiser(members, "c", resident=1)
    assert [member.place for member in members.values()] == ["cpu", "cpu", "meta"]
    layers = {name: nn.Linear(2, 2) for name in "ab"}
    asked: list[int] = []
    cast = ScheduledDenoiser(layers, "a", resident=1).to(torch.bfloat16)
    cast._apply(lambda tensor: asked.append(tensor.numel()) or tensor)  # type: ignore[func-returns-value]
    assert {part.dtype for part in cast.parameters()} == {torch.bfloat16} and sorted(asked) == [0, 2, 4]


def test_members_of_another_precision_are_given_and_give_theirs() -> None:
    members = {"half": Constant(1.5, 1, torch.bfloat16), "full": Constant(2.5, 9)}
    denoiser = ScheduledDenoiser(members)
    denoiser.set_schedule([999.0], ["half"])
    extra = {"text": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "more": [torch.ones(1)]}
    for arguments, options in (((torch.tensor(999.0),), {}), ((), {"timestep": torch.tensor(999.0)})):
        answer = denoiser(torch.zeros(1, 1, 2, 2), *arguments, extra=extra, **options).sample
        assert answer.dtype == torch.float32 and float(answer[0, 0, 0, 0]) == 1.5
        x, timestep, given = members["half"].given[-1]
        assert x.dtype == torch.bfloat16 and timestep.dtype == torch.float32
        assert given["text"].dtype == given["more"][0].dtype == torch.bfloat16 and given["ids"].dtype == torch.int64


def test_everything_else_is_the_primarys() -> None:
    large = unet(1, 16)
    denoiser = ScheduledDenoiser({"v1.4": unet(1, 8), "keys": large, "50%": unet(1, 12)})
    assert denoiser.primary == "keys" and list(denoiser.members) == ["v1.4", "keys", "50%"]
    assert denoiser.config is large.config and denoiser.dtype == torch.float32
    assert denoiser.device == torch.device("cpu") and denoiser.time_embedding is large.time_embedding
    assert next(denoiser.parameters()) is next(large.parameters())
    assert not hasattr(denoiser, "_orig_mod") and not hasattr(denoiser, "nothing_like_it")
    assert {key.split(".")[1] for key in denoiser.state_dict()} == {"=v1%2E4", "=keys", "=50%25"}
    assert copy.deepcopy(denoiser).config == large.config
    with pytest.raises(UserError, match="write_model_schedule"):
        denoiser.save_pretrained("nowhere")


def test_caches_of_all_members_hear_their_context() -> None:
    denoiser = zoo()
    with denoiser.cache_context("cond"):
        pass
    assert [member.contexts for member in denoiser.members.values()] == [["cond"]] * 3  # type: ignore[attr-defined]


def test_networks_that_hear_another_time_than_the_scheduler_says() -> None:
    denoiser = zoo(timestep_of=lambda timestep: 1000 * timestep)
    denoiser.set_schedule([1000.0, 400.0], ["small", "mid"])
    assert [said(denoiser, torch.tensor(time)) for time in (1.0, 0.71, 0.69, 0.4)] == [1.0, 1.0, 2.0, 2.0]


def test_inputs_by_name_and_plain_tensors() -> None:
    class Transformer(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value, self.config = value, SimpleNamespace(in_channels=1)

        def forward(self, hidden_states: Tensor, text: Tensor | None = None, timestep: Any = None) -> Tensor:
            return hidden_states + self.value

    denoiser = ScheduledDenoiser({"a": Transformer(1), "b": Transformer(2)})
    denoiser.set_schedule([9, 1], ["a", "b"])
    x = torch.zeros(1, 1, 2, 2)
    assert denoiser(hidden_states=x, timestep=torch.tensor([2])).unique().tolist() == [2]
    assert denoiser(x, None, torch.tensor([8])).unique().tolist() == [1]
