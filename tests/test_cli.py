"""The command line before anything heavy is imported: help, errors in one line, half a second."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracles.processor_time import children_seconds, keeping_modules

from genlight import cli
from genlight.help import help_text

ROOT = Path(__file__).resolve().parents[1]

BAD_COMMANDS = {
    "unknown command": (["fitt"], "there is no command 'fitt'; did you mean 'fit'?"),
    "no command": (["seed=1"], "no command is given"),
    "unknown experiment": (["fit", "experiment=digit"], "there is no experiment 'digit'; did you mean 'digits'?"),
    "unknown option": (["fit", "data=digitz"], "there is no data 'digitz'; did you mean 'digits'?"),
    "unknown group": (["fit", "dta=digits"], "there is no key 'dta'; did you mean 'data'?"),
    "misspelt key": (["fit", "trainer.max_stps=3"], "did you mean 'trainer.max_steps'? (conf/"),
    "misspelt nested key": (["fit", "module.noise_schedule.beta_schedul=x"], "'module.noise_schedule.beta_schedule'"),
    "misspelt root key": (["fit", "sed=3"], "there is no key 'sed'; did you mean 'seed'?"),
    "misspelt hydra key": (["fit", "hydra.rn.dir=x"], "did you mean 'hydra.run.dir'?"),
    "added key": (["fit", "+trainer.max_stepz=3"], "did you mean 'max_steps'? (set on the command line)"),
    "wrong type": (["fit", "trainer.max_steps=abc"], "trainer.max_steps='abc' has the wrong type: expected int"),
    "wrong type of ours": (["fit", "data.batch_size=many"], "data.batch_size='many' has the wrong type: expected int"),
    "wrong bool": (["fit", "resume=3"], "resume=3 has the wrong type: expected bool"),
    "number for a name": (["fit", "run.name=20261129"], "as a text it is written \"run.name='20261129'\""),
    "nan for a name": (["fit", "run.name=nan"], "as a text it is written \"run.name='nan'\""),
    "no option": (["fit", "search=null"], "; search=none leaves it out"),
    "no option and none": (["fit", "callbacks=null"], "callbacks=null names no option of callbacks (there are: class"),
    "seed out of range": (["fit", "seed=-1"], "a seed lies between 0 and 2**32 - 1"),
    "not key=value": (["fit", "trainer.max_steps=[1"], "is not an override of the form key=value"),
    "missing value": (["fit", "data.batch_size=???"], "data.batch_size"),
    "foreign target": (["fit", "module._target_=os.system"], "is not allowed: a target lies under"),
    "loader target": (["fit", "module._target_=diffusers.DiffusionPipeline.from_pretrained"], "not a loader"),
    "missing target": (["fit", "data._target_=genlight.data.digits.DigitDataModule"], "does not exist"),
    "url": (["validate", "ckpt_path=https://example.org/model.ckpt"], "URLs are refused"),
    "pickle flag": (["fit", "--experimental-rerun", "x.pickle"], "reads a pickle, which genlight never does"),
    "config folder": (["fit", "--config-dir", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_commands_answer_in_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err
    assert "Traceback" not in captured.err + captured.out


def user_config(folder: Path, text: str) -> list[str]:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\n# mine\n" + text)
    return ["fit", "--config-dir", str(folder), "experiment=mine"]


def test_a_wrong_key_in_a_users_own_file_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(user_config(tmp_path, "trainer:\n  max_steps: 3\n  max_stepz: 4\n")) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "there is no key 'trainer.max_stepz'" in error and "'max_steps'" in error and "mine.yaml:5" in error


def test_a_wrong_section_in_a_users_own_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(user_config(tmp_path, "traner:\n  max_steps: 3\n")) == cli.USAGE_ERROR
    assert "there is no key 'traner'; did you mean 'trainer'?" in capsys.readouterr().err


def test_a_file_cannot_allow_its_own_targets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "targets:\n  allow: [subprocess]\nmethod:\n  _target_: subprocess.Popen\n"
    assert cli.main(user_config(tmp_path, text)) == cli.USAGE_ERROR
    assert "is not allowed" in capsys.readouterr().err


def options() -> list[str]:
    names = []
    for file in (ROOT / "conf").rglob("*.yaml"):
        group, _, option = str(file.relative_to(ROOT / "conf").with_suffix("")).partition("/")
        names += [f"{group}={option}"] if option else []
    return sorted(names)


# what an option asks of the user, by a part of its name
ASKED = {
    "pretrained": ["module.pretrained=folder"],
    "module=pipeline": ["module.pretrained=folder", "data=prompts"],
    "data=prompts": ["module.pretrained=folder", "module=pipeline"],
    "lcm": ["module.pretrained=folder"],
    "method=lcsc": ["method.objective=val/fd_digits"],
    "experiment=dele/score_table": [],
    "bench": ["module=predictor", "metrics=none"],
    "score_table": ["module=predictor", "metrics=none", "data.path=table.csv"],
    "data=text_tasks": ["module=causal_lm", "metrics=none", "module.pretrained=folder", "data.tasks={}"],
    "data=hub_tasks": ["module=causal_lm", "metrics=none", "module.pretrained=folder"],
    "eep/mixtral": ["data.tasks={}"],
    "eep/deepseek": ["data.tasks={}"],
    "eep/gpt_oss": ["data.tasks={}"],
    "eep/olmoe": ["data.tasks={}"],
    "eep/qwen_moe": ["data.tasks={}"],
    "stack/digits_stage": ["module.pretrained=folder"],
    "method=stack": ["experiment=stack/digits"],
    "data=tiny_tasks": ["module=causal_lm", "metrics=none", "module.pretrained=folder"],
    "causal_lm": ["data=tiny_tasks", "metrics=none", "module.pretrained=folder"],
    "method=eep": ["search=eep", "method.num_experts=2"],
    "data=pairs": ["experiment=dd/digits"],
    "module=distilled_decoding": ["module.teacher=folder"],
    "method=dd": ["experiment=dd/digits"],
    "zoo": ["module.members={a: folder}"],
    "method=oms": ["method.objective=val/fd_digits", "search=oms"],
    "search=settings": ["search.strategy={_target_: genlight.search.spaces.solver_plan.S3Settings}"],
}


@pytest.mark.parametrize("option", options())
def test_every_shipped_option_passes_the_check(option: str, capsys: pytest.CaptureFixture) -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("genlight.cache", cli.cache_folder, replace=True)
    asked = next((words for part, words in ASKED.items() if part in option), [])
    assert cli.accepted(["command=fit", option, *asked]) is not None, capsys.readouterr().err


def test_cfg_job_prints_the_composed_config(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["fit", "--cfg", "job", "trainer.max_steps=7"]) == 0
    assert "max_steps: 7" in capsys.readouterr().out


def test_help_names_every_experiment_and_option() -> None:
    text = help_text()
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert file.stem in text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["fitt"], ["fit", "trainer.max_stps=3"], ["fit", "trainer.max_steps=abc"]], ids=" ".join
)
def test_help_and_errors_cost_no_more_than_reading_a_config(arguments: list[str], tmp_path: Path) -> None:
    """Half a second on a quiet core, as `tools/proofs/whole.py` measures; here beside importing what reads a config, in
    turns, since another process on the same core doubles the processor time of both. The best of three: the machine
    may be loading files for the first time, and Python keeps what it compiled.
    """
    readers = "import hydra.core.override_parser.overrides_parser, numpy, omegaconf"
    runs = [(cpu_of(tmp_path, "-m", "genlight", *arguments), cpu_of(tmp_path, "-c", readers)) for _ in range(3)]
    ours, bare = (min(seconds) for seconds in zip(*runs, strict=True))
    assert ours <= 2 * bare  # 1 on a quiet core; torch alone would make it 6


def cpu_of(compiled: Path, *arguments: str) -> float:
    """Processor seconds of a process of Python, which keeps compiled modules in a folder."""
    words, before = [sys.executable, *arguments], children_seconds()
    subprocess.run(words, capture_output=True, cwd=ROOT, env=keeping_modules(compiled), check=False)
    return children_seconds() - before


def test_versions_name_every_package_and_import_none(capsys: pytest.CaptureFixture) -> None:
    from importlib import metadata

    assert cli.main(["--versions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f"{name}=={metadata.version(name)}" for name in ("genlight", "torch", "omegaconf", "filelock")} <= set(
        lines
    )
    assert "lightning==2.6.2" not in lines and "lightning==2.6.3" not in lines


def test_no_torch_before_the_config_is_accepted() -> None:
    program = (
        "import sys; from genlight.cli import main; code = main(['fit', 'trainer.max_steps=abc']);"
        "heavy = {'torch', 'lightning', 'numpy', 'diffusers'} & set(sys.modules); print(code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "2 set()"
