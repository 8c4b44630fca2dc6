"""Send the metrics of a finished run to Weights & Biases, from its metrics.csv:

    python tools/wandb_replay.py runs/demo/fit --project genlight

For a run that had no W&B, or was offline in several parts: they become one run there. It has one id for a folder, and
steps that it holds already are not sent, so the same command again sends what is new, or nothing.
"""

import argparse
import csv
import hashlib
from pathlib import Path

from genlight import io
from genlight.errors import UserError
from genlight.run_folder import read_run


def main(arguments: list[str] | None = None) -> None:
    """Read and send; UserError as `replay`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run folder, such as runs/demo/fit")
    parser.add_argument("--project", default="genlight")
    parser.add_argument("--entity", help="user or team; W&B's default where it is left out")
    parser.add_argument("--offline", action="store_true", help="write <folder>/wandb, for wandb sync")
    options = parser.parse_args(arguments)
    sent = replay(options.folder, options.project, options.entity, options.offline)
    print(f"{sent} steps of {options.folder} sent to the run {identity(options.folder)}")


def replay(folder: Path, project: str, entity: str | None = None, offline: bool = False) -> int:
    """Log each step that the run at W&B does not hold yet; their number.

    Raises:
        UserError: no run folder, or one without metrics.csv.
        wandb.Error: W&B cannot be reached.
    """
    import wandb

    record, steps = read_run(folder), steps_of(folder)
    run = wandb.init(
        project=project,
        entity=entity,
        id=identity(folder),
        name=str(record["config"]["run"]["name"]),
        config=record["config"],
        dir=str(folder),
        resume="allow",
        mode="offline" if offline else "online",
        settings=wandb.Settings(quiet=True),
    )
    new = [step for step in steps if step >= run.step]
    for step in new:
        run.log(steps[step] | {"trainer/global_step": step}, step=step)
    if (folder / "report.json").is_file():
        run.summary.update(io.read_json(folder / "report.json")["metrics"])
    run.finish()
    return len(new)


def identity(folder: Path) -> str:
    """The id of a run at W&B: of its config and first start, wherever the folder lies and however often it went on."""
    record = read_run(folder)
    return hashlib.sha256(f"{record['fingerprint']} {record['created']}".encode()).hexdigest()[:10]


def steps_of(folder: Path) -> dict[int, dict[str, float]]:
    """The values of metrics.csv by step, in order; rows of one step become one.

    Raises:
        UserError: there is no such file.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing: it is written when a run ends")
    found: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if value and name != "step"}
            found.setdefault(int(row["step"]), {}).update(values)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
