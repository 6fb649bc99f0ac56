"""Modules of other projects whose sources lie in .oracles/sources, beside an installed package of the same name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCES = Path(__file__).parents[2] / ".oracles" / "sources"


def load(name: str, hollow: tuple[str, ...] = ()) -> ModuleType:
    """The module `name` from the sources; `hollow`: packages whose `__init__` is left out, for it imports too much."""
    package = name.partition(".")[0]
    hidden = {each: sys.modules.pop(each) for each in list(sys.modules) if each.partition(".")[0] == package}
    sys.path.insert(0, str(SOURCES))
    for each in hollow:
        sys.modules[each] = ModuleType(each)
        sys.modules[each].__path__ = [str(SOURCES / each.replace(".", "/"))]
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(SOURCES))
        for each in [each for each in sys.modules if each.partition(".")[0] == package]:
            del sys.modules[each]
        sys.modules.update(hidden)
    assert Path(module.__file__ or "").is_relative_to(SOURCES)
    return module


@pytest.fixture(scope="session")
def trl_ppo() -> ModuleType:
    """TRL 1.12: the last with PPO."""
    return load("trl.experimental.ppo.ppo_trainer")


@pytest.fixture(scope="session")
def verl_ppo() -> ModuleType:
    return load("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="session")
def verl_correction() -> ModuleType:
    return load("verl.trainer.ppo.rollout_corr_helper")


@pytest.fixture(scope="session")
def openrlhf_loss() -> ModuleType:
    return load("openrlhf.models.loss", hollow=("openrlhf", "openrlhf.models"))


@pytest.fixture(scope="session")
def openrlhf_utils() -> ModuleType:
    return load("openrlhf.models.utils", hollow=("openrlhf", "openrlhf.models"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)
