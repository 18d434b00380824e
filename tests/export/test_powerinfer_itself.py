"""Exported files in PowerInfer itself: `make test-powerinfer`.

Letters: B blocks, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.export.powerinfer_models import llama, written
from tests.tiny import passages

pytestmark = pytest.mark.powerinfer
LENGTH, PROMPT = 128, "w1 w2 w3"
TEXT = " ".join(passages(20))
IDS_T = torch.tensor(list(TEXT.encode()))
"""A byte is a token."""


def said(place: Path, *words: str | Path, **variables: str) -> bytes:
    """What a program prints; on one thread, with a cache in fp32; its log goes to place."""
    common = ("-t", "1", "--memory-f32")
    done = subprocess.run(
        [*map(str, words), *common], capture_output=True, env=variables, cwd=place, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout


def perplexity(programs: Path, file: Path, **variables: str) -> float:
    """Of TEXT, by PowerInfer."""
    text = file.with_name("text.txt")
    text.write_text(TEXT)
    words = (programs / "perplexity", "-m", file, "-f", text, "-c", str(LENGTH))
    found = re.search(rb"Final estimate: PPL = ([0-9.]+)", said(file.parent, *words, **variables))
    assert found is not None
    return float(found[1])


def expected(model: Any) -> float:
    """The same by ours: the second half of every block is scored."""
    ids_BT = IDS_T[: len(IDS_T) // LENGTH * LENGTH].view(-1, LENGTH)
    logits_BTV: Tensor = model(ids_BT).logits[:, LENGTH // 2 : -1]
    targets_BT = ids_BT[:, LENGTH // 2 + 1 :]
    return float(F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()).exp())


def behind_T(model: Any, text: bytes) -> Tensor:
    """How far each token after PROMPT is behind the one that ours would say, in logits."""
    ids_T = torch.tensor(list(text))
    logits_TV = model(ids_T[None]).logits[0, len(PROMPT) - 1 : -1]
    said_T = logits_TV.gather(-1, ids_T[len(PROMPT) :, None]).squeeze(-1)
    return logits_TV.amax(-1) - said_T


@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_perplexity_and_greedy_text_are_ours(
    activation: str, tied: bool, programs: Path, tmp_path: Path
) -> None:
    """Random predictors have many neurons near 0, where f16 decides: 5e-4 measured."""
    sizes = {"hidden_size": 128, "intermediate_size": 1056, "initializer_range": 0.1}
    model = llama(activation, tie_word_embeddings=tied, **sizes)
    _, file = written(model, tmp_path)
    ours = expected(model)
    assert perplexity(programs, file) == pytest.approx(ours, rel=2e-3)
    # with every neuron on it is another model: the predictors make it ours
    every = perplexity(programs, file, LLAMA_SPARSE_PRED_THRESHOLD="-1e30")
    assert every != pytest.approx(ours, rel=5e-3)
    words = ("-p", PROMPT, "-n", "12", "--temp", "0", "--repeat-penalty", "1.0", "--log-disable")
    text = said(tmp_path, programs / "main", "-m", file, *words)
    text = text.removeprefix(b" ")
    assert text.startswith(PROMPT.encode()) and len(text) > len(PROMPT) + 8
    assert behind_T(model, text).max() < 0.1  # the logits are 1.1 in standard deviation
