"""What holds for all tests: the order of their files, and how often a command composes its config."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

# the folders with the longest files: one that is begun last keeps a process busy while the others have nothing to do
LONGEST = ("loops", "trainer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra's main composes twice more what `genlight.cli.accepted` has composed: to learn its own mode, and to run.

    Here it is given copies, which saves a third of a small command. Those in processes of their own compose as they do.
    """
    compose, last = ConfigLoaderImpl.load_configuration, dict[Any, Any]()

    def composed(self: Any, config_name: str, overrides: list[str], *, from_shell: bool = True, **options: Any) -> Any:
        words = str(self.config_search_path), config_name, *(word for word in overrides if word != "hydra.mode=RUN")
        if not from_shell or words not in last:
            last.clear()
            config = compose(self, config_name, overrides, from_shell=from_shell, **options)
            if not from_shell:
                last[words] = config
            return config
        config = copy.deepcopy(last[words])
        OmegaConf.set_readonly(config.hydra, False)
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", composed)
        yield
