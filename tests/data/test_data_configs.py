import inspect
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class, instantiate

from genlight.data.text_examples import examples_of, task_of

FOLDER = Path(__file__).parents[2] / "conf" / "data"
# others begin with one of these
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if "\ndefaults:" not in path.read_text())


def test_every_data_set_has_a_config():
    assert {path.stem for path in CONFIGS} >= {"cifar10", "digits", "image_folder", "mnist"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_keys_are_the_constructors_arguments_each_with_a_comment(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    config = yaml.safe_load(path.read_text())
    arguments = inspect.signature(get_class(config.pop("_target_"))).parameters
    assert set(config) == set(arguments)
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_defaults_are_accepted(path, tmp_path):
    text = path.read_text().replace("${seed}", "0").replace("${paths.cache}", str(tmp_path))
    text = text.replace("${run.root}", str(tmp_path))
    config = yaml.safe_load(text.replace("tasks: ???", "tasks: {}"))
    data = instantiate(config)
    if "image_size" in config:
        assert data.image_shape == (config["channels"], config["image_size"], config["image_size"])
    assert data.draw == "report"


def test_tasks_of_the_hub_fit_the_rows_that_are_there():
    rows = {
        "boolq": {"passage": "P.", "question": "is it", "answer": True},
        "rte": {"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0},
        "arc": {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        "gsm8k": {"question": "Q?", "answer": "1 + 1 = 2\n#### 2"},
    }
    tasks = yaml.safe_load((FOLDER / "hub_tasks.yaml").read_text())["tasks"]
    found = {name: examples_of(name, task_of(name, tasks[name]), [row])[0] for name, row in rows.items()}
    assert tasks.keys() == found.keys()
    answers = {name: example.options[example.label] for name, example in found.items()}
    assert answers == {"boolq": "yes", "rte": "False", "arc": "y", "gsm8k": "1 + 1 = 2\n#### 2"}
