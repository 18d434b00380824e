"""What every test shares: no hub, no tokenizer threads, one seed, and what the kernels run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tiny models on two threads mostly wait for each other; the real ones ask for more themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Limits of a machine would choose other ways on another one.
os.environ["MOE_TOOLS_LIMITS"] = "built-in"

import pytest
import torch

from tests.elsewhere import asks_for, check_marks, leave_out

# transformers and huggingface_hub read these once, when a test module first imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def asks_for_card(config: pytest.Config) -> bool:
    """Whether `-m` names gpu."""
    return asks_for(config, "gpu")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Chooses between the interpreter and a card, in the first hook of this file that is called.

    The next conftest may import Triton, which reads its variable when it is first imported, by
    whomever: its kernels then run on CPU tensors.
    """
    config = pluginmanager.get_plugin("pytestconfig")
    assert isinstance(config, pytest.Config)
    if asks_for_card(config):
        os.environ.pop("TRITON_INTERPRET", None)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    # Else DeepSpeed, once transformers imports it, says on standard output that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses what `-m` asks for and this machine lacks."""
    check_marks(config)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs on either is for the card, where one is asked for; workers get long files first."""
    if asks_for_card(config):
        for item in items:
            if item.get_closest_marker("either"):
                item.add_marker("gpu")
    leave_out(config, items)
    if hasattr(config, "workerinput"):  # else one worker is alone with a long file at the end
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors go that name no place: to the card, in a test of `either` under -m gpu."""
    if not (asks_for_card(request.config) and request.node.get_closest_marker("either")):
        yield torch.get_default_device()
        return
    card = torch.device("cuda")
    torch.set_default_device(card)
    yield card
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whether it runs alone or after a thousand others."""
    torch.manual_seed(0)
