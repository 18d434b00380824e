"""A model that brings Python code of its own runs it only where the user says so."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.rows import rows_of
from tests.families import THRESHOLD, randomize

CODE = '''
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own_words"

    def __init__(self, vocab_size=64, hidden_size=20, neurons=45, layers=2, **others):
        super().__init__(**others)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.neurons, self.layers = neurons, layers


class OwnBlock(nn.Module):
    """No name and no module that other hosts have, F odd, D no multiple of 8."""

    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(config.hidden_size, config.neurons)
        self.second = nn.Linear(config.hidden_size, config.neurons)
        self.third = nn.Linear(config.neurons, config.hidden_size)

    def forward(self, x):
        return self.third(self.first(x) * nn.functional.silu(self.second(x)))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(nn.functional.layer_norm(x, x.shape[-1:]))
        return CausalLMOutput(logits=self.head(x))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def ask(*_: object) -> str:
        raise AssertionError("somebody asks on standard input")

    monkeypatch.setattr(builtins, "input", ask)
    made = tmp_path / "own"
    made.mkdir()
    (made / "own.py").write_text(CODE)
    config = {
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        "model_type": "own_words",
        "vocab_size": 64,
        "hidden_size": 20,
        "neurons": 45,
        "layers": 2,
        "dtype": "float32",
    }
    (made / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=draw)

    state = {"embed.weight": random(64, 20), "head.weight": random(64, 20)}
    for layer in range(2):
        for name in ("first", "second"):
            state[f"blocks.{layer}.{name}.weight"] = random(45, 20)
            state[f"blocks.{layer}.{name}.bias"] = random(45)
        state[f"blocks.{layer}.third.weight"] = random(20, 45)
        state[f"blocks.{layer}.third.bias"] = random(20)
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


@torch.no_grad()
def test_a_custom_model_is_found_proven_converted_and_loaded(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    model = load(folder, trust_remote_code=True)
    dense = model(input_ids=ids).logits
    attach_experts(model, THRESHOLD)
    (row,) = set(rows_of(load(folder, trust_remote_code=True)).values())
    assert (row.gate, row.up, row.down, row.function) == ("second", "first", "third", "silu")
    assert torch.equal(model(input_ids=ids).logits, dense)
    randomize(model)
    expected = model(input_ids=ids).logits
    assert not torch.equal(expected, dense)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", trust_remote_code=True)
    assert len(expert_ffns(again)) == 2
    assert torch.equal(again(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="its Python code comes with it: if you trust that, say"):
        load(tmp_path / "out")


def test_without_the_flag_a_command_says_so_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["upcycle", str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("say --trust-remote-code, or trust_remote_code=True in Python")
    assert main([*command, "--trust-remote-code"]) == 2  # its code ran, and the model loaded
    assert "OwnForCausalLM cannot be upcycled" in capsys.readouterr().err
