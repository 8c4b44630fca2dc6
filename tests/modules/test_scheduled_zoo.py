"""A zoo and a schedule written to a folder sample as they did, and a schedule is for its own weights alone."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import FlowSchedule
from genlight.errors import UserError
from genlight.modules.artifact_kind import schedule_files
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.model_schedule_file import write_model_schedule
from genlight.modules.scheduled_zoo import read_scheduled_zoo
from genlight.modules.zoo_module import ZooModule
from genlight.search.spaces.model_schedule import ModelScheduleSpace

NOISE, LABEL = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])


def folder_of(path: Path, zoo: ZooModule, schedules: dict[float, ModelSchedule]) -> Path:
    """As `method=oms` leaves it: the zoo, and a schedule for each budget."""
    zoo.save_pretrained(path)
    assert zoo.zoo is not None
    for budget, schedule in schedules.items():
        slots = 20 if schedule.kind == "ddim" else None
        file = path / f"model_schedule_{budget:g}.json"
        write_model_schedule(file, schedule, zoo.zoo.members, zoo.zoo.predictions, primary=zoo.primary, slots=slots)
    return path


def test_a_folder_samples_as_the_zoo_did(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """By turns, guided, on a grid, and by a member that is not the primary alone."""
    guided = {"class_conditional": True, "num_classes": 3, "label_dropout": 0.1, "guidance_scale": 2.0}
    for name, patch in {"small": 4, "large": 2}.items():
        tiny.module("vp", tiny.dit(patch_size=patch), **guided).save_pretrained(tmp_path / name)
    members = {name: str(tmp_path / name) for name in ("small", "large")}
    zoo = ZooModule(members, "large", num_inference_steps=None, guidance_scale=None)
    zoo.configure_model()
    schedules = {
        10.0: ModelSchedule("singlestep", (("large", "small"), ("small",))),
        9.0: ModelSchedule("singlestep", (("small",), ("small",))),
        2.0: ModelSchedule("ddim", (("large",), ("small",)), slots=(19, 7)),
    }
    folder = folder_of(tmp_path / "oms", zoo, schedules)
    assert [float(path.stem[15:]) for path in schedule_files(folder)] == [2, 9, 10]
    assert zoo.noise_schedule is not None
    for path, schedule in zip(schedule_files(folder), dict(sorted(schedules.items())).values(), strict=True):
        ModelScheduleSpace(zoo.noise_schedule, {"small": 1.0, "large": 2.0}, slots=20).apply(zoo, schedule)
        found = read_scheduled_zoo(path)
        assert found.guidance_scale == 2.0 and set(found.members) == set(schedule.members)
        assert torch.equal(found.sample(NOISE, LABEL), zoo.sample(NOISE, LABEL))
    with pytest.raises(UserError, match="several members and schedules of OMS"):
        DiffusionModule(pretrained=str(folder)).net  # noqa: B018
    own = folder / "members" / "small"
    shutil.rmtree(own)
    shutil.copytree(tmp_path / "large", own)
    same = pytest.warns(UserWarning, match="the same weights")
    with same, pytest.raises(UserError, match="other weights than the member small"):
        read_scheduled_zoo(folder / "model_schedule_10.json")


def test_times_stay_on_the_shift_that_was_searched(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Members of flow matching may differ in it: the primary's counts, also where the schedule does not use it."""
    for name, shift in {"small": 1.0, "large": 3.0}.items():
        network = tiny.unet(block_out_channels=(8, 8) if name == "small" else (16, 16))
        module = tiny.module("flow", network)
        module.noise_schedule = FlowSchedule(shift=shift)
        module.save_pretrained(tmp_path / name)
    zoo = ZooModule({name: str(tmp_path / name) for name in ("small", "large")}, "large", num_inference_steps=4)
    zoo.configure_model()
    assert zoo.prediction.schedule.definition()["shift"] == 3.0
    schedule = ModelSchedule("ddim", (("small",), ("small",)), slots=(19, 7))
    ModelScheduleSpace(zoo.prediction.schedule, {"small": 1.0, "large": 2.0}, slots=20).apply(zoo, schedule)
    folder = folder_of(tmp_path / "oms", zoo, {2.0: schedule})
    found = read_scheduled_zoo(folder / "model_schedule_2.json")
    assert list(found.members) == ["small"] and torch.equal(found.sample(NOISE), zoo.sample(NOISE))


def test_no_other_folder_has_schedules(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert schedule_files(tmp_path) == []
