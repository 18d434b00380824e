"""Models of pictures and text: their language model is converted, trained and measured as any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.twin import build_twin
from tests.checkpoint.test_composite import TEXT, VISION, donor
from tests.tiny import Run, build_tokenizer, rows_of, write_passages


def llava() -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=60,
    )
    return build_twin(LlavaForConditionalGeneration, config)


def qwen() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    eye = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=eye | {"out_hidden_size": 16, "patch_size": 14},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return build_twin(Qwen2_5_VLForConditionalGeneration, config)


RECIPE = """
name: pictures
data: text.txt
block_length: 16
steps:
- train: {tokens: 64}
- split: {expert_size: 8, tokens: 64}
- attach: {tokens: 64}
- train: {tokens: 128, mode: straight, target_sparsity: 0.3, losses: {lm: 1.0, efficiency: 0.1}}
"""


@pytest.fixture(scope="module", params=[donor, llava, qwen])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save(request.param(), folder / "donor", build_tokenizer())
    write_passages(folder / "text.txt", 300)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_every_verb_takes_it(run: Run, work: Path) -> None:
    host = type(load(work / "donor")).__name__
    words = ("--recipe", "recipe.yaml", "--model", "donor", "--dtype", "fp32")
    assert run("convert", *words, "--output", "dry", "--dry-run")[0] == 0
    assert run("convert", *words, "--output", "out", "--control")[0] == 0
    model = load(work / "out")
    assert type(model).__name__ == host
    assert len(expert_ffns(model)) == TEXT["num_hidden_layers"]
    donor, control, routed = rows_of(run, "out")
    assert donor["total_flops"] == control["total_flops"] > routed["total_flops"]
    for folder in ("donor", "out"):
        code, told, _ = run("doctor", folder, "--data", "text.txt", "--json", "-")
        assert code == 0
        assert json.loads(told)["host"] == host
    assert (
        run("generate", "out", "--prompt", "w1 w2", "--max-new-tokens", "3", "--optimize")[0] == 0
    )
