"""Inputs made to run code or to exhaust a reader, at every place where genlight reads what others may have written."""

import hashlib
import json
import os
import pickle
import random
import shutil
import string
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaigns.commands import Points
from safetensors.torch import load_file

from genlight import build, io
from genlight.checkpoints.importing import import_checkpoints
from genlight.checkpoints.trajectory import Trajectory
from genlight.config_check import ConfigError, check
from genlight.data import score_table
from genlight.data.npz import read_npz
from genlight.data.prompts import read_prompts
from genlight.data.tokenizer import load_tokenizer
from genlight.errors import UserError
from genlight.metrics.features import ClassifierFeatures, InceptionFeatures
from genlight.modules.consistency_folder import read_consistency
from genlight.modules.imagegpt_folder import read_imagegpt
from genlight.modules.model_schedule_file import load_model_schedule
from genlight.modules.pipeline_calls import load_pipeline
from genlight.modules.pretrained import load_autoencoder, read_pipeline
from genlight.modules.pretrained_lm import load_language_model
from genlight.modules.teacher import read_teacher
from genlight.modules.token_folder import read_token_teacher, read_tokenizer
from genlight.modules.zoo import load_zoo
from genlight.nets.published import load_published
from genlight.predictors.predictor_file import load_predictor
from genlight.quantization.saving import load_quantized
from genlight.quantization.statistics import load_statistics
from genlight.reports.member_costs import read_costs
from genlight.search.archive import unseal
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint
from genlight.trainer.consolidate import consolidated_state_dict
from genlight.trainer.deepspeed_engine import safe_checkpoint_engine

NAMES = (
    "model.pt",
    "step-000002.ckpt",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "features.npy",
    "features.npz",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "statistics.pkl",
    "calibration.safetensors",
    "weights.pth",
    "mp_rank_00_model_states.pt",
)
_UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
_PARTS = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
_CODE = {"AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Model", "code.Model"]}
_CONFIG = {
    "model_index.json": {"_class_name": "DDIMPipeline", **_PARTS},
    "unet/config.json": _UNET,
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "vae/config.json": {"_class_name": "AutoencoderKL"},
    "config.json": {"model_type": "mixtral", "auto_map": _CODE, "num_hidden_layers": 1, "hidden_size": 8},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": _CODE},
}
# the same folder with code of its own in other places: of the pipeline, of a part, of what Python has, of configs
_WITH_CODE: tuple[dict[str, Any], ...] = (
    {"model_index.json": {"_class_name": ["pipeline", "Model"], **_PARTS}},
    {"model_index.json": {"_class_name": "DDIMPipeline", "custom_pipeline": "pipeline", **_PARTS}},
    {"model_index.json": {"_class_name": "DDIMPipeline", **_PARTS, "unet": ["unet", "Model"]}},
    {"model_index.json": {"_class_name": "DDIMPipeline", **_PARTS, "unet": ["subprocess", "Popen"]}},
    {"unet/config.json": {**_UNET, "_class_name": "code.Model", "auto_map": _CODE}},
    {"scheduler/scheduler_config.json": {"_class_name": "code.Model", "auto_map": _CODE}},
    {"config.json": {"model_type": "own", "auto_map": {**_CODE, "AutoConfig": "code.Model"}}},
)
SLOTS: dict[str, Callable[[Path], Any]] = {
    "ckpt_path": load_checkpoint,
    "resume": lambda file: newest_whole_checkpoint(file.parent),
    "ckpt_path, sharded": lambda file: consolidated_state_dict(file.parent),
    "DeepSpeed shard": lambda file: safe_checkpoint_engine().load(str(file)),
    "state": lambda file: io.load_state(file, kind="checkpoint"),
    "method.statistics": lambda file: load_statistics(file, fingerprint="any"),
    "quantized weights": lambda file: load_quantized(file, torch.nn.Linear(2, 2)),
    "metrics.extractor.path": lambda file: ClassifierFeatures(file, "mine").setup(),
    "metrics.extractor.path, inception": lambda file: InceptionFeatures(path=file).setup(),
    "module.pretrained, pipeline": lambda file: read_pipeline(file.parent),
    "module.vae": lambda file: load_autoencoder(file.parent),
    "module.pretrained, language model": lambda file: load_language_model(str(file.parent)),
    "data.tokenizer": lambda file: load_tokenizer(str(file.parent)),
    "module.teacher": lambda file: read_token_teacher(file.parent),
    "module.tokenizer": lambda file: read_tokenizer(file.parent),
    "module.pretrained, any pipeline": lambda file: load_pipeline(str(file.parent), "auto", None, False),
    "module.pretrained, consistency": lambda file: read_consistency(file.parent),
    "module.members": lambda file: load_zoo({"one": str(file.parent)}),
    "module.teacher, diffusion": lambda file: read_teacher(file.parent),
    "module.teacher, ImageGPT": lambda file: read_imagegpt(file.parent),
    "module.schedule": load_model_schedule,
    "published weights": lambda file: load_published(torch.nn.Linear(2, 2), file),
    "tensors": io.load_tensors,
    "labels": io.read_labels,
    "predictor": lambda file: load_predictor(file.parent),
    "trajectory": lambda file: Trajectory.open(file.parent),
    "trajectory of checkpoints": lambda file: import_checkpoints([file], file.parent / "new", ["weight"]),
    "data.path": read_prompts,
    "data.path, arrays": lambda file: read_npz(file, ["features"]),
    "data.path, scores": score_table._read,
    "method.costs": read_costs,
    "history": lambda file: [unseal(line, str(file)) for line in io.read_lines(file)],
}


class Payload:
    """Unpickled, it makes the folder `sentinel`."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.sentinel, 0o777, False, True)


def write_payload(file: Path, sentinel: Path) -> None:
    """The payload in the form that goes with the file's name."""
    payload = Payload(sentinel)
    if file.suffix in (".pt", ".ckpt", ".bin", ".pth"):
        torch.save({"state_dict": payload}, file)
    elif file.suffix in (".npy", ".npz"):
        array = np.array([payload], dtype=object)
        np.save(file, array, allow_pickle=True) if file.suffix == ".npy" else np.savez(file, features=array)
    else:
        file.write_bytes(pickle.dumps(payload))


def folder_with(folder: Path, sentinel: Path, name: str, other: dict[str, Any]) -> Path:
    """A folder like those of the hub, with code, a pickle under `name` beside every config, and no whole weights; with
    `other` configs than usual."""
    code = f"from pathlib import Path\nPath({str(sentinel)!r}).mkdir(exist_ok=True)\nclass Model: ...\n"
    for inner, content in (_CONFIG | other).items():
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner).write_text(json.dumps(content))
        write_payload((folder / inner).parent / name, sentinel)
        for module in ("code.py", "pipeline.py", "unet.py", "modeling.py"):
            ((folder / inner).parent / module).write_text(code)
    write_payload(folder / name, sentinel)
    return folder / name


def pickles(root: Path) -> Points:
    """A payload under every name at every input: the sentinel never appears, and the refusal is an error for a user."""
    wrong, sentinel = [], root / "sentinel"
    folders: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES]
    folders += [("model.safetensors", other) for other in _WITH_CODE]
    for number, (name, other) in enumerate(folders):
        file = folder_with(root / str(number), sentinel, name, other)
        for slot, read in SLOTS.items():
            try:
                read(file)
                if slot != "resume":  # which passes over what it cannot read, and says so
                    wrong.append(f"{slot}, {name} {other}: accepted")
            except UserError as error:
                if "\n" in str(error):
                    wrong.append(f"{slot}, {name} {other}: {error}")
            except Exception as error:
                wrong.append(f"{slot}, {name} {other}: {type(error).__name__}: {error}")
            if sentinel.exists():
                wrong.append(f"{slot}, {name} {other}: the payload ran")
                sentinel.rmdir()
    return Points(len(folders) * len(SLOTS), wrong)


def hostile_texts(count: int, seed: int = 0) -> list[bytes]:
    """JSON and near-JSON of all kinds that hurt: deep, wide, long, repeated, not finite, cut and random."""
    rng = random.Random(seed)
    texts = [b"[" * 10**6, b'{"a":' * 10**5, b"[" + b"1," * 10**6 + b"1]", b'"' + b"x" * 10**7 + b'"', b"1" * 10**6]
    texts += [b"{" + b",".join(b'"%d":0' % n for n in range(10**6)) + b"}", b'{"a":1,"a":2}', b"[NaN]", b"[1e999]"]
    letters = '[]{}",:\\0123456789.eE+-truefalsn ' + string.ascii_letters
    while len(texts) < count:
        kind = rng.randrange(4)
        size = rng.choice([1, 10, 100, 10_000, 300_000])
        if kind == 0:
            texts.append("".join(rng.choices(letters, k=size)).encode())
        elif kind == 1:
            texts.append(rng.randbytes(size))
        elif kind == 2:
            texts.append(b"".join(rng.choices([b"[", b"{", b'"', b'{"a":', b"]", b"\\", b"1,"], k=size)))
        else:
            whole = b'{"a":[1,2.5,{"b":"\\u00e9"}],"c":' + b"[1]," * size + b"null}"
            texts.append(whole[: rng.randrange(len(whole))])
    return texts[:count]


def json_fuzz(root: Path, count: int, seed: int = 0) -> tuple[Points, float, float]:
    """Every hostile text is refused or read in a moment; the longest CPU time in seconds, and the most memory in MB."""
    wrong, longest, most = [], 0.0, 0.0
    file = root / "hostile.json"
    for number, text in enumerate(hostile_texts(count, seed)):
        file.write_bytes(text)
        for traced in (False, True):
            if traced:
                tracemalloc.start()
            begun = time.process_time()
            try:
                io.read_json(file)
            except io.CorruptFileError as error:
                if len(str(error)) > 400 or "\n" in str(error):
                    wrong.append(f"text {number}: {error}")
            except Exception as error:
                wrong.append(f"text {number}: {type(error).__name__}")
            if traced:
                most = max(most, tracemalloc.get_traced_memory()[1] / 1e6)
                tracemalloc.stop()
            else:
                longest = max(longest, time.process_time() - begun)
    return Points(count, wrong), longest, most


def weight_maps(root: Path) -> Points:
    """Folders whose index of weights names a file outside of them, where the whole weights lie: it is not read.

    Those of diffusers; of transformers' folders every name is refused that is not plain.
    """
    import diffusers

    pipeline, outside = root / "pipeline", root / "outside.safetensors"
    diffusers.DDIMPipeline(diffusers.UNet2DModel(**_UNET), diffusers.DDIMScheduler()).save_pretrained(pipeline)
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    inside = shutil.move(weights, weights.with_name("inside.safetensors"))
    shutil.copy(inside, outside)
    readers = (lambda: read_pipeline(pipeline), lambda: load_pipeline(str(pipeline), "auto", None, False))
    wrong, shards = [], (inside.name, os.path.relpath(outside, inside.parent), str(outside))
    for shard in shards:
        for read in readers:
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(inside), shard)}
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
            try:
                read()
            except UserError as error:
                if shard == inside.name:
                    wrong.append(f"{shard}: {error}")
            else:
                if shard != inside.name:
                    wrong.append(f"{shard}: read")
    return Points(len(shards) * len(readers), wrong)


def headers(root: Path, count: int, seed: int = 0) -> Points:
    """Hostile texts in the header of a file of tensors, with the checksum that it asks for: refused or read."""
    wrong, file = [], root / "hostile.safetensors"
    texts = [text for text in hostile_texts(count, seed) if len(text) <= 10**6]
    for number, text in enumerate(texts):
        header = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"x":' + text + b"}"
        whole = len(header).to_bytes(8, "little") + header
        file.write_bytes(whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1))
        for read in (io.load_tensors, io.read_labels):
            try:
                read(file)
            except io.CorruptFileError as error:
                if len(str(error)) > 400 or "\n" in str(error):
                    wrong.append(f"text {number}: {error}")
            except Exception as error:
                wrong.append(f"text {number}: {type(error).__name__}")
    return Points(2 * len(texts), wrong)


def names(root: Path, count: int, seed: int = 0) -> Points:
    """Random names made of what leads out of folders: none that is accepted does."""
    rng, wrong = random.Random(seed), []
    folder = root / "below"
    folder.mkdir()
    (folder / "link").symlink_to("..")
    parts = ["..", ".", "", "a", "link", "/", "\\", "\0", "\n", "~", "C:", "x" * 300, "\u2025", "%2e%2e"]
    for _ in range(count):
        name = "/".join(rng.choices(parts, k=rng.randrange(1, 5)))
        try:
            path = io.resolve_below(folder, name)
        except UserError:
            continue
        if not path.resolve().is_relative_to(folder.resolve()) or path == folder:
            wrong.append(repr(name))
    return Points(count, wrong)


PLAIN: dict[str, Any] = {
    **{"command": "fit", "seed": 0, "ckpt_path": None, "resume": False, "dry_run": False, "traceback": False},
    "run": {"name": "x", "root": "runs", "overwrite": False, "dir": "x"},
    "paths": {"cache": "x"},
    "targets": {"allow": []},
}
TARGETS = (
    *("os.system", "os.remove", "posix.system", "subprocess.Popen", "subprocess.run", "shutil.rmtree", "builtins.eval"),
    *("builtins.exec", "eval", "exec", "importlib.import_module", "runpy.run_path", "pickle.load", "joblib.load"),
    *("numpy.load", "pandas.read_pickle", "logging.os.system", "torch.load", "torch.hub.load", "torch.jit.load"),
    *("torch.serialization.load", "torch.nn.Module.load_state_dict", "torch.nn.modules.module.torch.load"),
    *(
        "torch.optim.Optimizer.load_state_dict",
        "torch.nn.functional.relu",
        "diffusers.DiffusionPipeline.from_pretrained",
    ),
    *("diffusers.utils.dynamic_modules_utils.get_class_from_dynamic_module", "diffusers.utils.hub_utils.push_to_hub"),
    *("diffusers.StableDiffusionPipeline.from_single_file", "transformers.AutoModel.from_pretrained"),
    *("transformers.dynamic_module_utils.get_class_from_dynamic_module", "transformers.pipeline"),
    *("transformers.utils.hub.cached_file", "lightning.pytorch.LightningModule.load_from_checkpoint"),
    *("lightning.fabric.utilities.cloud_io._load", "lightning.pytorch.cli.LightningCLI"),
    *("lightning.pytorch.utilities.migration.utils.pl_legacy_patch.load", "genlight.io.remove_path"),
    *(
        "genlight.io.primitives.rename",
        "genlight.runner.run",
        "genlight.cli.main",
        "genlight.run_folder.RunFolder.open",
    ),
    *("genlight.io.folders.shutil.rmtree", "genlight.session.Session", "hydra.utils.instantiate", "nowhere.Class"),
)
_BAD = {"_target_": "os.system", "command": "true"}
NESTED: tuple[dict[str, Any], ...] = (
    _BAD,
    {**_BAD, "_partial_": True},
    {"_target_": "os.system", "_args_": ["true"]},
    {"_target_": "genlight.loops.baseline.Baseline", "inner": _BAD},
    {"inner": [{"deeper": _BAD}]},
    {"inner": {"deeper": [[_BAD]]}},
    {"_target_": 3},
    {"_target_": ["os.system"]},
    {"_target_": "${oc.env:HOME}"},
)


def is_refused(target: str) -> bool:
    """Whether no config may name this target, by the check before torch or the one of the object."""
    node = {"method": {"_target_": target}}
    for refuse in (lambda: check({**PLAIN, **node}), lambda: build.check_targets(node, [])):
        try:
            refuse()
        except ConfigError:
            return True
        except Exception:
            return False
    return False
