"""A report handed to those who wait for it: on the screen, and to trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genlight.reports.report import Report, result_table

ARTIFACT = "artifact"


def print_result(folder: Path, report: Report, files: list[Path]) -> None:
    """The metrics beside the floor, the table, and the files of a run folder that are worth looking at."""
    from rich.console import Console

    console = Console(highlight=False)
    floors = report.floor.metrics if report.floor else {}
    for name, value in report.metrics.items():
        if report.table and "/" not in name:
            continue  # it stands in the table too
        floor = floors.get(name.rsplit("/", 1)[-1])
        console.print(f"{name:<24} {value:.4g}" + ("" if floor is None else f"   (real against real: {floor:.4g})"))
    if report.table:
        # cells that are three letters wide cannot be read
        console.print(result_table(report.table, console.width))
    console.print("look at", style="bold")
    for file in [folder / "report.md", *files, *([folder / ARTIFACT] if (folder / ARTIFACT).is_dir() else [])]:
        console.print(f"  {file}", soft_wrap=True)


def track(logger: Any, folder: Path, report: Report) -> None:
    """The result to a tracker that takes tables and folders (W&B), which is then closed."""
    if hasattr(logger, "log_table"):
        logger.log_table("report", ["metric", "value"], [[name, value] for name, value in report.metrics.items()])
    if hasattr(logger, "log_folder"):
        logger.log_folder(folder / "report.json", f"{folder.name}-report", "report")
        if (folder / ARTIFACT).is_dir():
            logger.log_folder(folder / ARTIFACT, f"{folder.name}-artifact", "model")
    if hasattr(logger, "finish"):
        logger.finish()
