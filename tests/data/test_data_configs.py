import inspect
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class, instantiate

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


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
