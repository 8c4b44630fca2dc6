"""Bad commands made from the configs of several experiments: their groups and keys, made wrong by seeded rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from genlight import cli
from genlight.config_check import GROUPS, resolved, targets
from genlight.config_errors import leaf_keys, options_of
from genlight.help import COMMANDS
from genlight.signatures import static_signature

EXPERIMENTS = ("digits", "s3/digits", "lcsc/digits_cd", "viditq/digits", "oms/digits", "dd/digits")
# stands in the section search, and is only referred to
ELSEWHERE = "method.search"


@dataclass(frozen=True)
class BadCommand:
    """Words after `python -m genlight`, texts of which one must stand in the answer, and the rule that made it."""

    rule: str
    words: tuple[str, ...]
    named: tuple[str, ...]


@cache
def composed(experiment: str) -> dict[str, Any]:
    """The config of an experiment as plain values; what is not given is left out."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("genlight.cache", cli.cache_folder, replace=True)
    with cli._composing():
        words = [f"experiment={experiment}", "command=validate"]
        config = compose("config", overrides=words, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        hydra = OmegaConf.to_container(OmegaConf.create({"hydra": OmegaConf.to_container(config.hydra)}), resolve=False)
        return {**resolved(job), **hydra}  # type: ignore[dict-item]


def misspelt(name: str, draw: random.Random) -> str:
    """A name with one letter left out, doubled or exchanged with its neighbour."""
    place = draw.randrange(1, len(name))
    kind = draw.choice(("left out", "doubled", "exchanged"))
    if kind == "doubled" or len(name) < 4 or (kind == "exchanged" and name[place] == name[place - 1]):
        return name[:place] + name[place - 1] + name[place:]
    if kind == "left out":
        return name[:place] + name[place + 1 :]
    return name[: place - 1] + name[place] + name[place - 1] + name[place + 1 :]


def _leaves(config: dict[str, Any]) -> list[str]:
    """Dotted keys of single values that a command line can set."""
    keys = [key for key in leaf_keys({k: v for k, v in config.items() if k != "hydra"}) if "_target_" not in key]
    keys = [key for key in keys if not key.startswith(ELSEWHERE)]
    return [key for key in keys if not isinstance(_at(config, key), dict) and key.split(".")[-1][0] != "_"]


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _with_last(key: str, change: Callable[[str], str]) -> str:
    section, dot, last = key.rpartition(".")
    return f"{section}{dot}{change(last)}"


def _misspelt_key(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    key = draw.choice([k for k in _leaves(config) if len(k.rpartition(".")[2]) > 3])
    return [f"{_with_last(key, lambda name: misspelt(name, draw))}=1"], [f"'{key}'"]


def _key_of_another_group(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    groups = [group for group in GROUPS if isinstance(config.get(group), dict) and config[group]]
    here, there = draw.sample(groups, 2)
    names = [name for name in config[there] if name not in config[here] and not name.startswith("_")]
    if not names:
        return _key_of_another_group(config, draw)
    name = draw.choice(names)
    return [f"{here}.{name}=1"], [f".{name}'"]


def _wrong_type(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    numbers = [k for k in _leaves(config) if isinstance(_at(config, k), bool | int) and _has_type(config, k)]
    key = draw.choice(numbers)
    return [f"{key}={draw.choice(('many', '[1,2,x]', '{a:b}'))}"], [key]


def _has_type(config: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    node = dict(targets(config)).get(section)
    signature = None if node is None else static_signature(node["_target_"])
    parameter = None if signature is None else signature.parameters.get(name)
    return not section or (parameter is not None and str(getattr(parameter.annotation, "id", "")) in ("int", "bool"))


def _out_of_range(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    choices = ["seed=-1", "seed=4294967296", "trainer.max_steps=-7", "trainer.max_epochs=-3", "trainer.num_nodes=0"]
    counts = ("batch_size", "eval_batch_size", "num_samples", "budget", "fidelity", "finalists", "workers", "samples")
    counts += ("trajectory", "select", "singles", "num_inference_steps", "every_n_train_steps", "num_train_timesteps")
    choices += [
        f"{key}=0" for key in _leaves(config) if key.split(".")[-1] in counts and isinstance(_at(config, key), int)
    ]
    word = draw.choice(choices)
    return [word], [word.split("=")[0], word.split("=")[0].partition(".")[2] or "seed"]


def _unknown_option(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    group = draw.choice([g for g in (*GROUPS, "experiment") if len(options_of(g)) > 1])
    option = draw.choice([o for o in options_of(group) if len(o) > 3])
    wrong = misspelt(option, draw)
    return [f"{group}={wrong}"], [f"'{option}'", f" {option}"]


def _missing_value(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    key = draw.choice([k for k in _leaves(config) if k not in ("command", "run.name")])
    return [f"{key}=???"], [key]


def _misspelt_hydra_key(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    names = ["hydra.run.dir", "hydra.job.chdir", "hydra.output_subdir", "hydra.verbose", "hydra.sweep.subdir"]
    key = draw.choice([*names, "hydra.job.name", "hydra.sweep.dir"])
    wrong = _with_last(key, lambda name: misspelt(name, draw))
    return [f"{draw.choice(('', '+', '++'))}{wrong}=x"], [f"'{key}'"]


def _foreign_target(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    section = draw.choice([path for path, _ in targets(config) if "." not in path])
    foreign = ("os.system", "subprocess.Popen", "torch.load", "torch.hub.load", "joblib.load", "builtins.eval")
    foreign += ("numpy.load", "pandas.read_pickle", "diffusers.DiffusionPipeline.from_pretrained", "shutil.rmtree")
    return [f"{section}._target_={draw.choice(foreign)}"], [f"{section}._target_"]


def _misspelt_target(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    own = [(path, node["_target_"]) for path, node in targets(config) if node["_target_"].startswith("genlight.")]
    own = [(path, target) for path, target in own if not path.startswith(ELSEWHERE)]
    path, target = draw.choice(own)
    wrong = _with_last(target, lambda name: misspelt(name, draw))
    return [f"{path}._target_={wrong}"], [f"'{target.rpartition('.')[2]}'"]


def _contradiction(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    key = draw.choice([k for k in _leaves(config) if "." in k])
    group = draw.choice(("data", "module", "trainer"))
    return draw.choice(
        [
            (["resume=true", "run.overwrite=true"], ["run.overwrite"]),
            ([f"~{key}", f"{key}=1"], [key, key.rpartition(".")[0]]),
            ([f"~{group}", f"{group}=nothing"], [group]),
            ([f"{key}=1,2"], [key]),
            (["ckpt_path=https://example.org/a.ckpt"], ["ckpt_path"]),
        ]
    )


def _wrong_command(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    command = draw.choice(list(COMMANDS))
    return [misspelt(command, draw)], [f"'{command}'"]


def _missing_file(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    return draw.choice(
        [
            (["--config-dir", "/nowhere/conf"], ["/nowhere/conf"]),
            (["--config-name", "confg"], ["'confg'"]),
            (["--config-dir"], ["--config-dir"]),
            (["--cfg", "jobs"], ["'job'"]),
            (["--confg", "job"], ["'--cfg'", "'--config-dir'", "'--config-name'"]),
        ]
    )


def _added_key(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    key = draw.choice(
        [k for k in _leaves(config) if _at(config, k) is not None and not isinstance(_at(config, k), list)]
    )
    return [f"+{key}=1"], [f"{key} is there already"]


def _removed_key(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    found = []
    for path, node in targets(config):
        signature = static_signature(node["_target_"])
        if signature is not None and not node.get("_partial_"):
            required = [p.name for p in signature.parameters.values() if p.required and p.name in node]
            found += [f"{path}.{name}" for name in required if node[name] is not None]
    key = draw.choice([*found, "trainer.max_stepps", "run.name", "seed"])
    return [f"~{key}"], [key.rpartition(".")[2].replace("stepps", "steps")]


def _no_option(config: dict[str, Any], draw: random.Random) -> tuple[list[str], list[str]]:
    group = draw.choice(GROUPS)
    return [f"{group}={draw.choice(('null', '1', 'true'))}"], [f"{group}="]


RULES: dict[str, Callable[[dict[str, Any], random.Random], tuple[list[str], list[str]]]] = {
    "misspelt key": _misspelt_key,
    "key of another group": _key_of_another_group,
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "unknown option": _unknown_option,
    "missing value": _missing_value,
    "misspelt hydra key": _misspelt_hydra_key,
    "foreign target": _foreign_target,
    "misspelt target": _misspelt_target,
    "contradiction": _contradiction,
    "wrong command": _wrong_command,
    "missing file": _missing_file,
    "key added that is there": _added_key,
    "key removed that is needed": _removed_key,
    "no option": _no_option,
}


def bad_commands(count: int, seed: int = 0) -> list[BadCommand]:
    """So many different bad commands, the rules and experiments in turn."""
    draw = random.Random(seed)
    made: dict[tuple[str, ...], BadCommand] = {}
    turn = 0
    while len(made) < count:
        rule = list(RULES)[turn % len(RULES)]
        experiment = draw.choice(EXPERIMENTS)
        turn += 1
        wrong, named = RULES[rule](composed(experiment), draw)
        chosen = [] if any(word.startswith("experiment=") for word in wrong) else [f"experiment={experiment}"]
        words = [*wrong, *chosen] if rule == "wrong command" else [draw.choice(list(COMMANDS)), *chosen, *wrong]
        made.setdefault(tuple(words), BadCommand(rule, tuple(words), tuple(named)))
    return list(made.values())
