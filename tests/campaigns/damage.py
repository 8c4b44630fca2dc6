"""Files of finished runs cut and flipped: whoever reads them must notice, and say which file it is."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.commands import Points, folder_of, resumed, some_of

from genlight import io
from genlight.errors import UserError
from genlight.io import tensors
from genlight.modules.pretrained import read_pipeline
from genlight.reports.report import read_report
from genlight.run_folder import read_run
from genlight.search.archive import unseal
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint

Reader = Callable[[], Any]


def protected(folder: Path) -> dict[Path, Reader]:
    """Every file of a run whose content is verified, with what reads it: checkpoints, artifact, state of searches."""
    readers: dict[Path, Reader] = {}
    for file in sorted(folder.glob("checkpoints/*.ckpt")):
        readers[file] = lambda file=file: load_checkpoint(file)
    for file in sorted((folder / "artifact").rglob("*")):
        if file.is_file():
            readers[file] = lambda: read_pipeline(folder / "artifact")
    for file in sorted(folder.glob("search/*/*.jsonl")):
        readers[file] = lambda file=file: [unseal(line, str(file)) for line in io.read_lines(file)]
    for file in sorted(folder.glob("search/*/outcome.json")):
        readers[file] = lambda file=file: io.read_record(file, kind="solver_outcome", version=2)
    for file in [*folder.glob("*.safetensors"), *folder.glob("search/**/*.safetensors")]:
        readers[file] = lambda file=file: io.load_tensors(file)
    return readers


def recorded(folder: Path) -> dict[Path, Reader]:
    """The other files that are read again, which a cut must not make another thing of."""
    readers = {
        folder / "run.json": lambda: read_run(folder),
        folder / "report.json": lambda: read_report(folder / "report.json"),
    }
    readers[folder / "environment.json"] = lambda: io.read_json(folder / "environment.json")
    return readers


def unnoticed(file: Path, content: bytes, read: Reader, damaged: bytes) -> str:
    """What is wrong if a file with damaged content is read; empty if the damage is told, with the file's name."""
    undamaged = read()
    file.write_bytes(damaged)
    try:
        found = read()
    except (UserError, ValueError) as error:
        told = isinstance(error, UserError) and "\n" not in str(error)
        return "" if told and _names(file, str(error)) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        file.write_bytes(content)
    # a last line that is torn is taken back; the line break at the end of JSON is no content
    if file.suffix == ".jsonl" and found == undamaged[: len(found)]:
        return ""
    return "" if file.suffix == ".json" and json.loads(damaged) == json.loads(content) else "not noticed"


def _names(file: Path, text: str) -> bool:
    # of a folder that verifies itself the file or its manifest is named
    return file.name in text or "manifest.json" in text


def cuts(folder: Path, lengths: int = 20) -> Points:
    """Every file that is read again, cut at so many lengths from nothing to one byte less than all."""
    wrong, tried = [], 0
    for file, read in (protected(folder) | recorded(folder)).items():
        content = file.read_bytes()
        for length in sorted({round(i * (len(content) - 1) / max(lengths - 1, 1)) for i in range(lengths)}):
            tried += 1
            if fault := unnoticed(file, content, read, content[:length]):
                wrong.append(f"{file.relative_to(folder)} cut to {length} bytes: {fault}")
    return Points(tried, wrong)


def flips(folder: Path, count: int, seed: int = 0) -> Points:
    """Random bits flipped, one at a time, in all files that are verified."""
    rng, readers = random.Random(seed), protected(folder)
    wrong, files = [], list(readers)
    for number in range(count):
        file = files[number % len(files)]
        content = bytearray(whole := file.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        if fault := unnoticed(file, whole, readers[file], bytes(content)):
            wrong.append(f"{file.relative_to(folder)}, byte {place} of {len(whole)}: {fault}")
    return Points(count, wrong)


def cut_checkpoints(folder: Path, lengths: int = 20) -> Points:
    """The newest checkpoint cut: the one before it is taken, and the reason names the file."""
    newest, _ = newest_whole_checkpoint(folder / "checkpoints")
    assert newest is not None
    content, wrong = newest.read_bytes(), []
    places = sorted({round(i * (len(content) - 1) / max(lengths - 1, 1)) for i in range(lengths)})
    for length in places:
        newest.write_bytes(content[:length])
        taken, skipped = newest_whole_checkpoint(folder / "checkpoints")
        if taken is None or taken == newest or [path for path, _ in skipped] != [newest]:
            wrong.append(f"cut to {length} bytes: {taken} is taken, {skipped}")
    newest.write_bytes(content)
    return Points(len(places), wrong)


def harmed_runs(
    root: Path, words: list[str], whole: Path, expected: dict[str, str], count: int | None = None
) -> Points:
    """Every file of a finished run cut in half, or made empty: the same command with resume=true ends with one line, or
    with equal results."""
    names = sorted(
        str(f.relative_to(whole)) for f in folder_of(whole, words).rglob("*") if f.is_file() and f.stat().st_size
    )
    cases = [(name, length) for name in names if ".lock" not in name for length in (0.5, 0.0)]

    wrong, chosen = [], some_of(cases, count)
    for number, (name, share) in enumerate(chosen):
        place = root / f"harmed-{number}"
        shutil.copytree(whole, place, symlinks=True)
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(len(content) * share)])
        if resumed(place, words, expected, torn=True):
            text = (place / "output.txt").read_text()
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            if len(lines) != 1 or "Traceback" in text or "details in" in lines[0] or Path(name).name not in lines[0]:
                wrong.append(f"{name} cut to {share:.0%}: {text[-300:]}")
        shutil.rmtree(place)
    return Points(len(chosen), wrong)


def hash_cost(folder: Path, megabytes: int = 256) -> dict[str, float]:
    """CPU seconds a gigabyte that verifying a checkpoint or a file of a folder costs, whichever is more; and its share
    in loading the checkpoint."""
    import torch

    file = folder / "large.ckpt"
    io.save_state(file, {"state_dict": {"w": torch.randn(megabytes * 2**18)}}, kind="checkpoint")
    verify = _cpu_seconds(lambda: _verified(file))
    digest = _cpu_seconds(lambda: io.sha256_of(file))
    load = _cpu_seconds(lambda: load_checkpoint(file))
    file.unlink()
    return {"seconds_per_gb": max(verify, digest) / megabytes * 1000, "share_of_load": verify / load}


def _verified(path: Path) -> None:
    with path.open("rb") as file:
        tensors._verify(file, path)


def _cpu_seconds(action: Callable[[], Any]) -> float:
    """The least of three."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        action()
        times.append(time.process_time() - begun)
    return min(times)
