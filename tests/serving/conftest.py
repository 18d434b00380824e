"""Tiny models to serve, and a server of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion
from tests.families import EXPERT_SIZE, build, randomize, routed
from tests.served import Running, running
from tests.tiny import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"
)
SELECTOR = {"kind": "threshold", "tau": 0.5}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/ and routed/ of one tiny llama that never ends by itself."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("models")
    donor, tokenizer = build("llama", max_position_embeddings=128), build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    donor.generation_config.eos_token_id = None
    save(donor, work / "dense", tokenizer)
    model, _ = routed(donor, Conversion(str(work / "dense"), EXPERT_SIZE, "sigmoid", SELECTOR))
    randomize(model)
    save(model, work / "routed", tokenizer)
    return work


@pytest.fixture(scope="session")
def served(folders: Path) -> Iterator[Running]:
    """The routed model, batched."""
    with running(folders / "routed") as server:
        yield server
