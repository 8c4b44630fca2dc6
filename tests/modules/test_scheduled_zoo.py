"""A zoo and a schedule written to a folder sample as they did, and a schedule is for its own weights alone."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genlight.diffusion.model_schedule import ModelSchedule
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


def test_no_other_folder_has_schedules(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert schedule_files(tmp_path) == []
