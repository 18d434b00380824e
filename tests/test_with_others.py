"""A converted folder where its users already work: pipeline, generate, PEFT, Trainer, lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from tests.checkpoint.test_loading import convert, make_tokenizer
from tests.combinations import adapters_inside_a_model
from tests.families import EXPERT_SIZE, aligned, build, logits, model_inputs

TOPK = {"kind": "topk", "k": 2}
ORACLE = Conversion("donor", EXPERT_SIZE, "oracle", TOPK)
REPRESENTATIVE = Conversion("donor", EXPERT_SIZE, "representative", TOPK)
NO_ADAPTERS = adapters_inside_a_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted llama with a tokenizer of three words."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "[UNK]", "world"
    save(convert(), tmp_path / "model", tokenizer)
    return tmp_path / "model"


def routed_tokens(model: nn.Module, **inputs: Any) -> int:
    """Decisions of the first FFN while a model continues some text."""
    with record_routing(model) as routings, torch.no_grad():
        model.generate(**inputs)
    return sum(each.tokens for each in routings if each.ffn.endswith("layers.0.mlp"))


def test_a_pipeline_is_routed(folder: Path) -> None:
    pipe = pipeline("text-generation", str(folder), dtype=torch.float32)
    assert len(expert_ffns(pipe.model)) == 2
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    (said,) = pipe("hello big", return_tensors=True, **asked)
    expected = load(folder).generate(**pipe.tokenizer("hello big", return_tensors="pt"), **asked)
    assert said["generated_token_ids"] == expected[0].tolist()


def test_a_cache_changes_nothing_but_the_tokens_that_are_routed(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    asked = inputs | {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**asked, use_cache=True)
    assert torch.equal(cached, model.generate(**asked, use_cache=False))
    assert routed_tokens(model, **asked, use_cache=True) == 3 + 4
    assert routed_tokens(model, **asked, use_cache=False) == 3 + 4 + 5 + 6 + 7


def test_padding_changes_nothing(folder: Path) -> None:
    """A router sees one token at a time: what stands beside it in a batch is no matter."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11, 12]])
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    padded = torch.cat([torch.zeros(1, 2).long(), short], 1)
    batch_BT = torch.cat([padded, long])
    mask_BT = (batch_BT != 0).long()
    together = model.generate(input_ids=batch_BT, attention_mask=mask_BT, **asked)
    alone = [
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)[0, -5:]
        for ids in (short, long)
    ]
    assert torch.equal(together[:, -5:], torch.stack(alone))


def with_adapter(model: PreTrainedModel, *targets: str) -> PeftModel:
    """LoRA with weights that do something."""
    modules = list(targets or ("gate_proj", "up_proj", "down_proj", "q_proj"))
    stored_as_conv1d = model.config.model_type == "gpt2"
    settings = LoraConfig(r=2, target_modules=modules, fan_in_fan_out=stored_as_conv1d)
    peft = get_peft_model(model, settings)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return peft.eval()


def test_peft_trains_saves_loads_and_merges(folder: Path, tmp_path: Path) -> None:
    peft = with_adapter(AutoModelForCausalLM.from_pretrained(folder)).train()
    ids = model_inputs(peft)["input_ids"]
    before = {name: value.clone() for name, value in peft.named_parameters()}
    optimizer = torch.optim.SGD([each for each in peft.parameters() if each.requires_grad], 0.1)
    peft(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {
        name for name, value in peft.named_parameters() if not torch.equal(value, before[name])
    }
    assert any(".mlp.gate_proj.lora_A" in name for name in changed)
    assert all("lora_" in name for name in changed)

    trained = logits(peft.eval())
    peft.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(expert_ffns(loaded)) == 2
    assert (logits(loaded) - trained).abs().max() <= 2e-6
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - trained).abs().max() <= 5e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("conversion", [ORACLE, REPRESENTATIVE], ids=["oracle", "representative"])
def test_routers_that_read_rows_see_adapters(conversion: Conversion, family: str) -> None:
    model = build(family)
    attach_experts(model, conversion)
    targets = {"llama": ("gate_proj", "up_proj"), "gpt2": ("c_fc",), "phi3": ("gate_up_proj",)}
    peft, x_TD = with_adapter(model, *targets[family]), torch.randn(5, 16)
    ffn = expert_ffns(peft)[0]
    with torch.no_grad():
        adapted = logits(peft)
        scores_TE = ffn.route(x_TD).scores_TE
        with peft.disable_adapter():
            assert not torch.allclose(ffn.route(x_TD).scores_TE, scores_TE, atol=1e-3)
        merged = peft.merge_and_unload()
        assert (expert_ffns(merged)[0].route(x_TD).scores_TE - scores_TE).abs().max() <= 1e-4
    assert (logits(merged) - adapted).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["sign", "int8_gate"])
def test_predictors_from_few_bits_see_adapters(kind: str) -> None:
    model = build("llama")
    selector = {"kind": "threshold", "tau": 0.4}
    attach_experts(model, Conversion("donor", 1, kind, selector))
    peft, x_TD = with_adapter(model, "gate_proj"), torch.randn(5, 16)
    ffn = expert_ffns(peft)[0]
    scores_TE = ffn.route(x_TD).scores_TE
    with peft.disable_adapter():
        assert not torch.allclose(ffn.route(x_TD).scores_TE, scores_TE, atol=1e-3)
    merged = expert_ffns(peft.merge_and_unload())[0]
    assert ((merged.route(x_TD).scores_TE - scores_TE).abs() <= 1e-4).float().mean() >= 0.99


@pytest.mark.skipif(NO_ADAPTERS != "", reason=NO_ADAPTERS)
def test_an_adapter_loads_into_the_model_itself(folder: Path, tmp_path: Path) -> None:
    peft = with_adapter(AutoModelForCausalLM.from_pretrained(folder), "down_proj", "q_proj")
    peft.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(str(tmp_path / "adapter"))
    assert (logits(model) - logits(peft)).abs().max() <= 2e-6
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")  # by its adapter's config
    assert len(expert_ffns(again)) == 2
    assert (logits(again) - logits(peft)).abs().max() <= 2e-6


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows of nine tokens that are their own labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(model: PreTrainedModel, output: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(output),
        use_cpu=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        save_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train(**options)
    return trainer


def test_trainer_trains_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    trainer = train(model, tmp_path / "run")
    trained = logits(model.eval())
    assert not torch.allclose(trained, before, atol=1e-3)
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), trained)

    middle = tmp_path / "run" / "checkpoint-3"
    assert len(expert_ffns(AutoModelForCausalLM.from_pretrained(middle))) == 2
    resumed = AutoModelForCausalLM.from_pretrained(folder)
    train(resumed, tmp_path / "run", resume_from_checkpoint=str(middle))
    assert (logits(resumed.eval()) - trained).abs().max() <= 1e-5


def test_the_other_linears_can_be_quantised_and_the_rest_is_saved_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = logits(model)
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and (".self_attn." in name),
    )
    seen = logits(model)
    assert 0 < (seen - exact).abs().max() <= 0.3
    dense = load(folder).state_dict()
    kept = {key: value for key, value in model.state_dict().items() if ".self_attn." not in key}
    assert len(kept) > 10 and all(torch.equal(dense[key], value) for key, value in kept.items())


# lm-evaluation-harness


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The folder of a task that needs no hub."""
    data, folder = tmp_path / "questions.jsonl", tmp_path / "tasks"
    rows = [{"q": "hello big", "choices": ["hello", "world"], "answer": i % 2} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    folder.mkdir()
    (folder / "echo.yaml").write_text(
        f"""
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


@pytest.mark.slow
def test_lm_eval_from_its_own_command_line(folder: Path, task: Path, tmp_path: Path) -> None:
    """And what it scores is the routed model, not its dense self."""
    command = [sys.executable, "-m", "moe_tools.patched", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "echo"]
    command += ["--include_path", str(task), "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    offline = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["echo"]["acc,none"] == 0.5
    (samples,) = (tmp_path / "out").rglob("samples_echo_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    said = [float(answer[0][0]) for answer in first["resps"]]
    routed, dense = (score(load(folder, routed=which)) for which in (True, False))
    assert said == pytest.approx(routed, abs=1e-4) and said != pytest.approx(dense, abs=1e-3)


@torch.no_grad()
def score(model: PreTrainedModel) -> list[float]:
    """Log-probability of hello and of world after "hello big"."""
    logits_V = model(torch.tensor([[1, 0]])).logits[0, -1]
    return logits_V.log_softmax(-1)[[1, 2]].tolist()


@pytest.mark.slow
def test_tasks_beside_the_perplexity(
    folder: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    donor = tmp_path / "donor"
    save(build("llama"), donor, make_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"hello big world {i} " * 40 for i in range(40)))
    table = tmp_path / "table.json"
    words = ["evaluate", str(folder), "--donor", str(donor), "--data", str(text), "--tokens", "256"]
    words += ["--block-length", "32", "--dtype", "fp32", "--json", str(table)]
    assert main([*words, "--tasks", "echo", "--task-folder", str(task), "--limit", "2"]) == 0
    assert [row["tasks"] for row in json.loads(table.read_text())] == [{"echo acc": 0.5}] * 2


def test_tasks_without_the_harness_are_one_clear_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe_tools.measure.tasks.find_spec", lambda name: None)
    assert main(["evaluate", str(folder), "--tasks", "arc_easy"]) == 2
    expected = "moe-tools: --tasks needs lm-evaluation-harness: pip install 'moe-tools[eval]'\n"
    assert capsys.readouterr().err == expected
