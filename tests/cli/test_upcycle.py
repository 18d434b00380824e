"""`moe-tools upcycle` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from tests.families import build, logits
from tests.tiny import Run, build_tokenizer


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folders donor, bare and gpt2, and the file file.txt."""
    save(build("llama", mlp_bias=False), tmp_path / "donor", build_tokenizer())
    save(build("mistral"), tmp_path / "bare")
    save(build("gpt2"), tmp_path / "gpt2")
    (tmp_path / "file.txt").write_text("mine")
    return tmp_path


def test_the_folder_is_a_stock_mixtral_of_the_donor_s_function(run: Run) -> None:
    words = ("--num-experts", "3", "--top-k", "1", "--dtype", "fp32")
    code, _, err = run("upcycle", "donor", "--output", "moe", *words)
    assert code == 0
    assert "moe: 1 of 3 experts a token, 0.0M parameters" in err
    model = MixtralForCausalLM.from_pretrained("moe")
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (3, 1)
    assert (logits(model) - logits(load("donor"))).abs().max() < 1e-5
    assert load_tokenizer("moe").get_vocab() == load_tokenizer("donor").get_vocab()


def test_seed_and_noise_decide_what_differs(run: Run) -> None:
    made = {}
    for name, words in {
        "one": ("--noise", "0.1", "--seed", "1"),
        "again": ("--noise", "0.1", "--seed", "1"),
        "other": ("--noise", "0.1", "--seed", "2"),
    }.items():
        assert run("upcycle", "bare", "--output", name, "--dtype", "fp32", *words)[0] == 0
        made[name] = load(name).state_dict()
    key = "model.layers.0.mlp.experts.down_proj"
    assert all(torch.equal(made["one"][name], tensor) for name, tensor in made["again"].items())
    assert not torch.equal(made["one"][key], made["other"][key])
    plain = load("bare").state_dict()["model.layers.0.mlp.down_proj.weight"]
    for expert in made["one"][key]:
        assert (expert - plain).std() == pytest.approx(0.1 * plain.std().item(), rel=0.1)


MISTAKES = {
    "family": (("gpt2", "--output", "new"), "GPT2LMHeadModel cannot be upcycled: give one of"),
    "no model": (("no", "--output", "new"), "cannot load no: no such folder"),
    "output exists": (("donor", "--output", "bare"), "bare exists and is not empty: choose"),
    "output is a file": (("donor", "--output", "file.txt"), "file.txt exists and is not empty"),
    "more than there are": (
        ("donor", "--output", "new", "--num-experts", "2", "--top-k", "3"),
        "top_k is 3, but must be between 1 and the 2 experts",
    ),
    "none chosen": (
        ("donor", "--output", "new", "--top-k", "0"),
        "--top-k: '0' is no whole number of at least 1",
    ),
    "no experts": (
        ("donor", "--output", "new", "--num-experts", "0"),
        "--num-experts: '0' is no whole number of at least 1",
    ),
    "noise": (("donor", "--output", "new", "--noise", "-1"), "'-1' is no number of at least 0"),
    "no output": (("donor",), "the following arguments are required: --output"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake: str, run: Run, tmp_path: Path) -> None:
    words, message = MISTAKES[mistake]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("upcycle", *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before
