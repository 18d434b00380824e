"""evaluate, generate and doctor on a tiny llama, saved with a tiny tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.data import blocks
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.natural import natural_sparsity, observe
from moe_tools.waiting import CHOICES
from tests.families import EXPERT_SIZE, build
from tests.tiny import EVALUATE, WORDS, Run, build_tokenizer, rows_of


def test_a_folder_stands_beside_its_donor_and_its_control(run: Run, work: Path) -> None:
    donor, control, model = rows_of(run, "out")
    assert [donor["role"], control["role"], model["role"]] == ["donor", "control", "model"]
    assert [donor["model"], model["model"]] == [str(work / "donor"), "out"]
    assert control["model"] == "out/control"
    assert [donor["train_tokens"], control["train_tokens"], model["train_tokens"]] == [
        None,
        1200,
        1000,
    ]
    assert model["ratio_to_donor"] == pytest.approx(model["perplexity"] / donor["perplexity"])
    assert model["ratio_to_control"] == pytest.approx(model["perplexity"] / control["perplexity"])
    assert control["ratio_to_donor"] == pytest.approx(control["perplexity"] / donor["perplexity"])
    assert donor["ratio_to_donor"] is donor["ratio_to_control"] is None
    assert 0 < model["ffn_sparsity"] < 1 and donor["ffn_sparsity"] == control["ffn_sparsity"] == 0
    assert set(model["layer_sparsity"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_the_figures_are_those_of_evaluate(run: Run, work: Path) -> None:
    *_, row = rows_of(run, "out")
    text = blocks(str(work / "text.txt"), build_tokenizer(), split="heldout", length=16, tokens=128)
    expected = evaluate(load(work / "out"), text)
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
    assert row["ffn_sparsity"] == pytest.approx(expected.ffn_sparsity)
    assert row["total_flops"] == pytest.approx(expected.flops.total)
    assert (row["tokens"], row["dtype"], row["device"]) == (8 * 15, "float32", "cpu")


def test_the_table_is_on_standard_output(run: Run, work: Path) -> None:
    code, out, err = run("evaluate", "out", *EVALUATE, "--json", "rows.json")
    assert code == 0 and err == ""
    for words in ("(donor)", "out/control ", "sparsity", "float32 on cpu"):
        assert words in out
    assert len(json.loads((work / "rows.json").read_text())) == 3


def test_several_folders_share_the_donor(run: Run, work: Path) -> None:
    shutil.copytree(work / "out", work / "second", dirs_exist_ok=True)
    rows = rows_of(run, "out", "second")
    assert [row["model"] for row in rows[1:]] == ["out/control", "out", "second/control", "second"]
    assert rows[2]["perplexity"] == rows[4]["perplexity"]


def test_a_dense_folder_has_a_row_of_its_own(run: Run) -> None:
    (row,) = rows_of(run, "donor")
    assert row["role"] == "model" and row["layer_sparsity"] == {}
    assert row["ffn_flops"] == row["ffn_dense_flops"]


def test_a_model_that_is_named_twice_has_one_row(run: Run, work: Path) -> None:
    names = [row["model"] for row in rows_of(run, str(work / "donor"), "out", "out")]
    assert names == [str(work / "donor"), "out/control", "out"]


def test_another_donor_can_be_given(run: Run) -> None:
    donor, _, model = rows_of(run, "out", "--donor", "donor")
    assert donor["model"] == "donor"
    assert model["ratio_to_donor"] == pytest.approx(model["perplexity"] / donor["perplexity"])


def test_a_donor_that_is_gone_is_left_out_with_a_note(run: Run, work: Path) -> None:
    shutil.copytree(work / "out", work / "orphan", dirs_exist_ok=True)
    config = json.loads((work / "orphan" / "config.json").read_text())
    config["moe_tools"]["donor"] = "gone"
    (work / "orphan" / "config.json").write_text(json.dumps(config))
    code, out, err = run("evaluate", "orphan", *EVALUATE, "--json", "-")
    assert code == 0
    assert [row["role"] for row in json.loads(out)] == ["control", "model"]
    assert "moe-tools: no row for the donor of orphan" in err and "gone" in err


def test_the_recipe_names_the_text(run: Run, work: Path) -> None:
    shutil.copytree(work / "donor", work / "trained", dirs_exist_ok=True)
    recipe = "name: x\ndata: text.txt\nsteps: [split: {}]\n"
    (work / "trained" / "recipe.yaml").write_text(recipe)
    code, out, _ = run(
        *("evaluate", "trained", "--tokens", "32", "--block-length", "16", "--json", "-")
    )
    assert code == 0
    assert json.loads(out)[0]["data"] == "text.txt"


def test_other_tokens_cannot_be_compared(run: Run, work: Path) -> None:
    save(build("llama"), work / "other", build_tokenizer(WORDS[::-1]))
    code, out, err = run("evaluate", "out", "other", *EVALUATE)
    assert code == 2 and not out
    assert "other has another tokenizer than out" in err and "Traceback" not in err


def test_an_encoder_gets_its_mask_token(run: Run, work: Path) -> None:
    save(build("bert"), work / "bert", build_tokenizer())
    (row,) = rows_of(run, "bert")
    assert row["tokens"] == 8 * 2  # 15 % of 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "missing", *EVALUATE), "missing"),
        (("evaluate", "out", *EVALUATE, "--donor", "missing"), "missing"),
        (("evaluate", "out", *EVALUATE, "--data", "missing.txt"), "'missing.txt' is not there"),
        (("evaluate", "donor", *EVALUATE, "--block-length", "4096"), "--block-length"),
        (("evaluate", "out", *EVALUATE, "--device", "nonsense"), "--device nonsense"),
        (("evaluate", "out", *EVALUATE, "--device", "meta"), "--device meta holds no numbers"),
        (("generate", "missing", "--prompt", "w1"), "missing"),
        (("generate", "out", "--prompt", "w1", "--chat"), "out has no chat template"),
        (
            ("generate", "out", "--prompt", "w1", "--max-new-tokens", "4000"),
            "exceed the context of 2048 tokens",
        ),
        (("generate", "donor", "--prompt", "w1", "--optimize"), "has no FFN to optimise: dense"),
        (("generate", "out", "--prompt", "w1", "--packed-dtype", "int8"), "add --optimize"),
        (("generate", "out", "--prompt", "w1", "--linears", "int8"), "--linears is of the sparse"),
        (("generate", "out", "--prompt", "w1", "--screen", "0"), "--screen is of the sparse"),
        (("doctor", "missing"), "missing"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words)
    assert code == 2 and not out
    assert err.startswith("moe-tools: ") and err.count("\n") == 1
    assert message in err


GENERATE = ("--prompt", "w1 w2 w3", "--max-new-tokens", "8", "--dtype", "fp32")


def test_generate_streams_text_and_says_how_sparse_it_was(run: Run, work: Path) -> None:
    code, out, err = run("generate", "out", *GENERATE)
    assert code == 0
    model = load(work / "out")
    ids = torch.tensor([[4, 5, 6]])  # w1 w2 w3
    expected = []
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    assert out.split() == [WORDS[token - 3] for token in expected]
    assert "8 tokens in" in err and "tokens/s (float32 on cpu); FFN sparsity" in err


def test_generate_says_that_a_dense_model_is_dense(run: Run) -> None:
    code, _, err = run("generate", "donor", *GENERATE)
    assert code == 0 and "; dense, prompt included" in err


def test_the_sparsity_of_a_generation_is_that_of_its_masks(run: Run, work: Path) -> None:
    model = load(work / "out")
    with torch.no_grad():
        for ffn, on in zip(expert_ffns(model), (2, 5), strict=True):
            ffn.router.weight.zero_()
            ffn.router.bias.copy_(200.0 * (torch.arange(6) < on) - 100.0)
    save(model, work / "made", build_tokenizer())
    _, _, err = run("generate", "made", *GENERATE)
    assert f"FFN sparsity {5 / 12:.1%}" in err


def test_the_seed_decides_what_is_sampled(run: Run) -> None:
    hot = (*GENERATE, "--temperature", "2", "--seed")
    texts = [run("generate", "out", *hot, seed)[1] for seed in ("0", "0", "1")]
    assert texts[0] == texts[1] != texts[2]


def test_chat_uses_the_template(run: Run, work: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "w9 w9 {{ messages[0].content }} w9"
    shutil.copytree(work / "out", work / "chat", dirs_exist_ok=True)
    tokenizer.save_pretrained(work / "chat")
    plain = run("generate", "chat", *GENERATE[2:], "--prompt", "w9 w9 w1 w9")
    code, out, _ = run("generate", "chat", "--chat", *GENERATE[2:], "--prompt", "w1")
    assert code == 0 and out == plain[1]


@pytest.mark.parametrize("packed", [(), ("--packed-dtype", "fp32")])
def test_an_optimised_model_writes_the_same_text(run: Run, packed: tuple[str, ...]) -> None:
    plain = run("generate", "out", *GENERATE)
    code, out, err = run("generate", "out", *GENERATE, "--optimize", *packed)
    assert code == 0 and out == plain[1]
    assert err.split("; ")[-1] == plain[2].split("; ")[-1]  # the same FFN sparsity


def test_a_dense_relu_model_is_optimised_too(run: Run, work: Path) -> None:
    save(build("llama", hidden_act="relu"), work / "relu", build_tokenizer())
    plain = run("generate", "relu", *GENERATE)
    code, out, err = run("generate", "relu", *GENERATE, "--optimize")
    assert code == 0 and out == plain[1] and "; dense, prompt included" in err


def test_weights_of_eight_bits_write_a_text_too(run: Run) -> None:
    code, out, _ = run("generate", "out", *GENERATE, "--optimize", "--packed-dtype", "int8")
    assert code == 0 and len(out.split()) == 8


def test_an_encoder_continues_nothing(run: Run, work: Path) -> None:
    save(build("roberta"), work / "roberta", build_tokenizer())
    code, _, err = run("generate", "roberta", "--prompt", "w1")
    assert code == 2 and "continues no text" in err


def test_doctor_on_a_dense_model(run: Run) -> None:
    code, out, err = run("doctor", "donor")
    assert code == 0 and err == ""
    for words in ("LlamaForCausalLM", "2 x gated SiLU, D=16 F=48", "4, 8, 16", "reference"):
        assert words in out
    assert "converted    no" in out


def test_doctor_on_a_converted_model(run: Run, work: Path) -> None:
    code, out, _ = run("doctor", "out")
    assert code == 0
    assert "experts of 8 neurons, router sigmoid, selector (kind threshold, tau 0.5)" in out
    assert str(work / "donor") in out


def test_doctor_on_a_split_model(run: Run, work: Path) -> None:
    shutil.copytree(work / "donor", work / "split", dirs_exist_ok=True)
    config = json.loads((work / "split" / "config.json").read_text())
    config["moe_tools"] = Conversion("donor", EXPERT_SIZE).to_dict()
    (work / "split" / "config.json").write_text(json.dumps(config))
    assert "split into experts of 8 neurons, no router yet" in run("doctor", "split")[1]


def test_doctor_on_a_swapped_model(run: Run, work: Path) -> None:
    model = build("llama")
    theta = {"kind": "fatrelu", "theta": 0.5}
    swap_activations(model, Conversion("the donor", activation=theta))
    save(model, work / "swapped")
    _, out, _ = run("doctor", "swapped")
    assert "activation fatrelu (theta 0.5), not split; from the donor" in out
    assert "2 x gated FATReLU, D=16 F=48" in out
    own = {"model.layers.0.mlp": {"kind": "relu"}}
    conversion = Conversion("the donor", EXPERT_SIZE, activation=theta, activation_of=own)
    swap_activations(model, conversion)
    save(model, work / "own")
    words = "activation fatrelu (its own in every FFN), split into experts of 8 neurons, no router"
    assert words in run("doctor", "own")[1]


def test_doctor_in_json(run: Run) -> None:
    code, out, _ = run("doctor", "out", "--json", "-")
    facts = json.loads(out)
    assert code == 0
    assert facts["shapes"][0]["expert_sizes"] == [4, 8, 16]
    assert facts["conversion"]["router"] == "sigmoid"
    assert facts["machine"]["kernels"] == ["cpu", "reference"]
    assert facts["tokenizer"]


def test_doctor_says_how_threads_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    assert "waiting      OpenMP's own (how PyTorch's threads" in run("doctor", "donor")[1]
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    facts = json.loads(run("doctor", "donor", "--json", "-")[1])
    assert facts["machine"]["waiting"] == "GOMP_SPINCOUNT=7"


def test_doctor_says_what_is_sparse_by_nature(run: Run, work: Path) -> None:
    save(build("llama", hidden_act="relu"), work / "zeros", build_tokenizer())
    code, out, _ = run("doctor", "zeros", "--data", "text.txt", "--tokens", "64", "--json", "-")
    natural = json.loads(out)["natural"]
    assert code == 0 and (natural["data"], natural["tokens"]) == ("text.txt", 64)
    text_BT = blocks(str(work / "text.txt"), build_tokenizer(), split="train", length=64, tokens=64)
    expected = natural_sparsity(observe(load(work / "zeros"), text_BT))
    assert natural["zeros"] == pytest.approx(expected.zeros)
    assert natural["sparsity"] == pytest.approx(expected.sparsity)
    assert [ffn["name"] for ffn in natural["ffns"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    line = (
        f"{expected.zeros:.1%} exact zeros; {expected.sparsity:.1%} of the neurons can go at CETT"
    )
    assert line in run("doctor", "zeros", "--data", "text.txt", "--tokens", "64")[1]


def test_doctor_says_what_perplexity_buys(run: Run) -> None:
    words = ("doctor", "donor", "--data", "text.txt", "--tokens", "64", "--ppl", "1")
    code, out, _ = run(*words)
    assert code == 0 and "PPL-1%" in out and " can go: perplexity " in out
    within = json.loads(run(*words, "--json", "-")[1])["natural"]["within"]
    assert within["increase"] == 0.01
    assert within["perplexity"] <= 1.01 * within["dense_perplexity"]
    code, _, err = run("doctor", "donor", "--ppl", "0")
    assert code == 2 and "the increase is 0.0, but must be above 0" in err


def test_doctor_without_a_tokenizer(run: Run, work: Path) -> None:
    save(build("llama"), work / "bare")
    code, out, _ = run("doctor", "bare")
    assert code == 0 and "tokenizer    none" in out and "sparsity" not in out
