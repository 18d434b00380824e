"""SmolLM2, routed without training, in vLLM: perplexity and greedy text are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.cli.demo import donor_file
from moe_tools.data import blocks
from moe_tools.experts.conversion import conversion_so_far, write_conversion
from moe_tools.recipe import Attach, Split
from moe_tools.steps.attach import attach
from moe_tools.steps.split import split
from tests.vllm.conftest import in_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

NEW, PROMPT = 24, 64
WAYS = {
    "topk": (32, Attach(selector={"kind": "topk", "k": 36})),
    "threshold": (8, Attach(start_sparsity=0.25)),
    "few_bits": (1, Attach(router="few_bits", selector={"kind": "threshold", "tau": 0.2})),
}
"""Name -> neurons of an expert, and the step that attaches its routers."""
NEAR = {"topk": 1e-4, "threshold": 2e-2, "few_bits": 2e-2}
"""Name -> how far the mean log probability may be. The last bit of a score decides now and then
whether an expert runs, and all later tokens follow: the more experts, the sooner. With another
attention of transformers, and with packed FFNs, ours are as far from ours."""
OPTIMIZED = {"additional_config": {"moe_tools": {"optimize": True}}}


def text(split_name: str) -> Tensor:
    """Two blocks of documentation."""
    tokenizer = load_tokenizer(donor_file())
    return blocks("docs", tokenizer, split=split_name, length=256, tokens=512)


def convert(folder: Path, name: str) -> None:
    size, step = WAYS[name]
    model, source = load(donor_file(), dtype=torch.float32), str(donor_file())
    made = Split(expert_size=size, method="contiguous")
    so_far = made.conversion(conversion_so_far(model, source))
    split(model, made, torch.empty(0, 1, dtype=torch.long), seed=0)
    write_conversion(model, so_far)
    attach(model, step, so_far, text("train"))
    save(model, folder)


@torch.no_grad()
def ours(folder: Path, blocks_BT: Tensor, **options: Any) -> tuple[Tensor, list[list[int]]]:
    """Log probabilities, and greedy text after the first tokens of each block."""
    model = load(folder, dtype=torch.float32, **options)
    said = [model(ids[None]).logits[0, :-1].log_softmax(-1) for ids in blocks_BT]
    own = [each.gather(1, ids[1:, None]) for each, ids in zip(said, blocks_BT, strict=True)]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = [
        model.generate(ids[None, :PROMPT], attention_mask=torch.ones(1, PROMPT), **settings)[0]
        for ids in blocks_BT
    ]
    return torch.cat(own)[:, 0], [ids[PROMPT:].tolist() for ids in whole]


@pytest.mark.parametrize("name", WAYS)
def test_smollm2_says_the_same(name: str, tmp_path: Path) -> None:
    folder, blocks_BT = tmp_path / name, text("heldout")
    convert(folder, name)
    long: dict[str, Any] = {"folder": str(folder), "prompts": blocks_BT.tolist(), "new": 1}
    short = long | {"prompts": blocks_BT[:, :PROMPT].tolist(), "new": NEW}
    room = {"max_model_len": 512}
    jobs = {
        "long": long | {"options": room},
        "short": short,
        "long optimized": long | {"options": OPTIMIZED | room},
        "short optimized": short | {"options": OPTIMIZED},
    }
    served = in_vllm(jobs, tmp_path)
    for way, optimize in (("", False), (" optimized", True)):
        wanted, greedy = ours(folder, blocks_BT, optimize=optimize)
        said = torch.tensor([value for row in served[f"long{way}"]["logprobs"] for value in row])
        far = (said - wanted).abs()
        assert float(far[:4].max()) < 1e-4  # before the first such bit
        assert float(said.mean()) == pytest.approx(float(wanted.mean()), abs=NEAR[name])
        assert served[f"short{way}"]["tokens"] == greedy
