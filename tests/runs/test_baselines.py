"""Baselines beside a model: each at its price, on the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_tools.checkpoint.saving import save
from moe_tools.cli import options
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import Evaluation, evaluate
from moe_tools.runs.baselines import BASELINES, Given, default_after
from tests.families import FAMILIES, build
from tests.tiny import Run, build_tokenizer, write_passages

TEXT_BT = torch.randint(5, 64, (16, 16), generator=torch.Generator().manual_seed(3))
HELD_BT = torch.randint(5, 64, (8, 16), generator=torch.Generator().manual_seed(4))
AFTER = 8
CAUSAL = [name for name in FAMILIES if name not in ("bert", "roberta", "t5-relu", "t5-gated")]
# gate, up and down: copies of gate and up in 4.5 bits, and a norm in bf16 a neuron of width 16
PROPOSAL = (2 * 16 * 4.5 + 16) / (3 * 16 * 16)


def measured(name: str, family: str = "llama", off: float = 0.5) -> Evaluation:
    model = build(family)
    given = Given("donor", TEXT_BT, AFTER)
    bar = BASELINES[name]
    bar.prepare(model, given)
    with bar.at(model, off, given) as correct:
        return correct(evaluate(model, HELD_BT, after=AFTER))


def test_the_command_line_knows_them() -> None:
    assert tuple(BASELINES) == options.BASELINES


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("int8", 8.5 / 16),
        ("int4", 4.5 / 16),
        ("teal", 0.5),
        ("cats", 1 / 3 + 2 / 3 * 0.5),
        ("few_bits", PROPOSAL + 0.5),
        ("griffin", 0.5),
    ],
)
def test_bytes_of_each(name: str, share: float) -> None:
    seen = measured(name)
    # thresholds are those of other text, and TEAL's budget is that of attention, too
    assert seen.traffic[1].ffn_share == pytest.approx(share, abs=0.15 if name == "teal" else 0.04)
    takes = BASELINES[name].takes_budget
    if name in ("few_bits", "griffin"):
        assert seen.ffn_sparsity == pytest.approx(0.5, abs=0.05)
    assert (seen.ffn_sparsity == 0) is not takes
    assert (seen.flops.few_bit_ops > 0) is (name == "few_bits")
    assert seen.tokens == 8 * (16 - AFTER)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_has_every_baseline(name: str, family: str) -> None:
    seen = measured(name, family)
    assert seen.traffic[1].ffn_share < 1
    assert seen.flops.ffn_share <= 1 + 1e-9


@pytest.mark.parametrize("name", ["teal", "cats", "few_bits", "griffin"])
def test_a_smaller_budget_costs_more(name: str) -> None:
    shares = [measured(name, off=off).traffic[1].ffn_share for off in (0.2, 0.5, 0.8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[2] > 0.3


@pytest.mark.parametrize(("name", "levels"), [("int8", 255), ("int4", 15)])
def test_dense_models_are_rounded(name: str, levels: int) -> None:
    torch.manual_seed(0)
    before = [ffn.weights().up_FD.clone() for ffn in unfused_ffns(build("llama"))]
    torch.manual_seed(0)
    model = build("llama")
    BASELINES[name].prepare(model, Given("donor", TEXT_BT))
    for old_FD, ffn in zip(before, unfused_ffns(model), strict=True):
        new_FD = ffn.weights().up_FD
        assert not torch.equal(new_FD, old_FD)
        step_F = 2 * old_FD.abs().amax(1) / (levels - 1)
        assert ((new_FD - old_FD).abs() <= step_F[:, None] * 2.5).all()  # scales are searched
        assert all(len(row.unique()) <= levels for row in new_FD)


@pytest.mark.parametrize("name", ["teal", "cats", "few_bits", "griffin"])
def test_a_budget_does_not_depend_on_the_one_before(name: str) -> None:
    given, bar, found = Given("donor", TEXT_BT, AFTER), BASELINES[name], []
    model = None
    for off in (0.5, 0.2, 0.5):
        if model is None or not bar.reusable():
            torch.manual_seed(0)
            model = build("llama")
            bar.prepare(model, given)
        with bar.at(model, off, given) as correct:
            found.append(correct(evaluate(model, HELD_BT, after=AFTER)))
    assert found[0].nats_per_token == found[2].nats_per_token != found[1].nats_per_token
    assert found[0].traffic == found[2].traffic != found[1].traffic


def test_griffin_alone_needs_a_prompt() -> None:
    assert default_after(None, ("int8", "griffin"), 512) == 256
    assert default_after(None, ("int8", "teal"), 512) == 0
    assert default_after(3, ("griffin",), 512) == 3


# --- the command line


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt and donor/."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    write_passages(folder / "text.txt", 200)
    save(build("llama"), folder / "donor", build_tokenizer())
    return folder


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from moe_tools.cli.main import main

    monkeypatch.chdir(work)
    return lambda *words: (main(words), *capsys.readouterr())


WORDS = ("--data", "text.txt", "--tokens", "256", "--block-length", "16", "--dtype", "fp32")


def test_evaluate_puts_them_beside_a_dense_model(run: Run, work: Path) -> None:
    words = ("--baselines", *BASELINES, "--budgets", "0.3", "0.6", "--plot", "bars.svg")
    code, out, err = run("evaluate", "donor", *WORDS, *words, "--json", "-")
    assert code == 0, err
    donor, *rows = json.loads(out)
    assert (donor["model"], donor["role"]) == ("donor", "donor")
    assert [row["model"] for row in rows] == [
        *("dense int8", "dense int4"),
        *[f"{n} at {s}" for n in ("teal", "cats", "few_bits", "griffin") for s in ("0.3", "0.6")],
    ]
    for row in rows:
        ratio = row["perplexity"] / donor["perplexity"]
        assert row["ratio_to_donor"] == pytest.approx(ratio)
        assert (row["after"], row["tokens"], row["text"]) == (8, donor["tokens"], donor["text"])
    assert "after the first 8 of each" in " ".join(err.split())
    drawn = (work / "bars.svg").read_text()
    assert all(bar.title in drawn for bar in BASELINES.values())


def test_only_what_follows_is_predicted(run: Run) -> None:
    found = [json.loads(run("evaluate", "donor", *WORDS, "--after", str(after), "--json", "-")[1])
             for after in (0, 1, 15)]  # fmt: skip
    whole, same, last = (rows[0] for rows in found)
    assert whole["perplexity"] == same["perplexity"]  # the first token is never predicted
    assert (whole["tokens"], last["tokens"]) == (16 * 15, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--after", "16"),
            "after the first 16 tokens of a block of 16 there is nothing to predict",
        ),
        (("--baselines", "griffin", "--after", "0"), "give --after"),
        (("--baselines", "teal", "--budgets", "1.0"), "but must be in [0, 0.99]"),
        (("--baselines", "few_bits", "--budgets", "0"), "target_sparsity"),
        (("--baselines", "int3"), "invalid choice: 'int3'"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, run: Run) -> None:
    code, out, err = run("evaluate", "donor", *WORDS, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@torch.no_grad()
def test_after_by_hand() -> None:
    model = build("llama")
    logits_BTV: Tensor = model(input_ids=HELD_BT).logits
    nats = torch.nn.functional.cross_entropy(
        logits_BTV[:, AFTER - 1 : -1].flatten(0, 1), HELD_BT[:, AFTER:].flatten()
    )
    assert evaluate(model, HELD_BT, after=AFTER).nats_per_token == pytest.approx(nats.item())
    encoder = evaluate(build("bert"), HELD_BT, mask_token=4, after=AFTER)
    assert 0 < encoder.tokens < evaluate(build("bert"), HELD_BT, mask_token=4).tokens
