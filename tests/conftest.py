"""What every test shares: no hub, no tokenizer threads, one seed, and what the kernels run on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec

# Tiny models on two threads mostly wait for each other; the real ones ask for more themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Limits of a machine would choose other ways on another one.
os.environ["MOE_TOOLS_LIMITS"] = "built-in"

import pytest
import torch

# transformers and huggingface_hub read these once, when a test module first imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def asks_for_card(config: pytest.Config) -> bool:
    """Whether `-m` names gpu, other than in `not gpu`; xdist hands `-m` down to its workers."""
    return asks_for(config, "gpu")


def asks_for(config: pytest.Config, mark: str) -> bool:
    """Whether `-m` names a mark, other than in `not mark`."""
    expression = config.known_args_namespace.markexpr or ""
    return re.search(rf"(?<!not )\b{mark}\b", expression) is not None


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
    """Refuses `-m gpu` without a card: a run that skipped all it was asked for would look well.

    And `-m vllm` without vLLM.
    """
    if asks_for_card(config) and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu asks for a card, and torch sees none")
    if asks_for(config, "vllm") and find_spec("vllm") is None:
        raise pytest.UsageError("-m vllm asks for vLLM, which is not installed: make test-vllm")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs on either is for the card where one is asked for; else what needs one is left out.

    Left out as by -m, not skipped: who asks for no card need not read of it.
    """
    if asks_for_card(config):
        for item in items:
            if item.get_closest_marker("either"):
                item.add_marker("gpu")
    for mark in ("gpu", "vllm"):
        if not asks_for(config, mark):
            left = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]


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
