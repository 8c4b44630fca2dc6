"""An artifact of `method=oms` as one generator: a model schedule, with its members from the same folder."""

from __future__ import annotations

from pathlib import Path

from genlight.diffusion.schedulers import read_scheduler
from genlight.errors import UserError
from genlight.io import resolve_below
from genlight.modules.model_schedule_file import load_model_schedule
from genlight.modules.zoo_module import ZooModule
from genlight.search.spaces.model_schedule import ModelScheduleSpace


def read_scheduled_zoo(path: str | Path) -> ZooModule:
    """A zoo of diffusion models that samples by a model schedule; members are those that lie beside the file.

    Args:
        path: of a ``model_schedule_<budget>.json`` that `method=oms` wrote for ``module=zoo``.

    Raises:
        UserError: as `load_model_schedule`; a member that cannot be read, or has other weights than the schedule was
            made for.
    """
    folder, file = Path(path).parent, load_model_schedule(path)
    sources = {record.name: str(_member_folder(folder, record.name)) for record in file.members}
    module = ZooModule(sources, primary=file.primary, num_inference_steps=None, guidance_scale=None)
    module.configure_model()
    assert module.zoo is not None
    for record in file.members:
        if module.zoo.members[record.name].sha256 != record.sha256:
            raise UserError(f"{sources[record.name]} has other weights than the member {record.name} of {path} had")
    costs = dict.fromkeys(sources, 1.0)  # what members cost decides nothing any more
    slots = file.slots or ModelScheduleSpace.slots
    schedule, _ = read_scheduler(file.build_scheduler())  # the searched one; members may differ in its shift
    ModelScheduleSpace(schedule, costs, slots=slots).apply(module, file.schedule)
    return module


def _member_folder(folder: Path, name: str) -> Path:
    """Of a member in the artifact: the primary of the search is the folder itself."""
    own = resolve_below(folder / "members", name)
    return own if own.is_dir() else folder
