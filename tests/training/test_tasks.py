"""Training an encoder-decoder on targets, and a regression: gradients, padding, resuming."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moe_tools.data import Batch
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.names import IGNORE
from moe_tools.recipe import Train
from moe_tools.training.logit_losses import logit_losses
from moe_tools.training.train import train
from tests.families import build, is_router, randomize
from tests.killed import Killed, kill_at

SIGMOID = Conversion("donor", 8, "sigmoid", {"kind": "threshold", "tau": 0.5})
EVERYTHING = {
    "lm": 1.0,
    "distill": 0.5,
    "distill_ffn": 0.1,
    "efficiency": 0.1,
    "separability": 0.1,
    "load_balance": 0.1,
    "l1": 0.01,
    "hoyer": 0.01,
    "clamped": 0.01,
}
DENSE = Train(tokens=1, batch_size=3, lr=3e-3)


def t5(routed: bool = True, dropout: float = 0.0) -> PreTrainedModel:
    """The same on every call."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
    other = {"eos_token_id": 1, "feed_forward_proj": "relu", "dropout_rate": dropout}
    config = T5Config(**sizes, **tokens, **other)
    model = T5ForConditionalGeneration(config)
    if routed:
        attach_experts(model, SIGMOID)
        randomize(model)
    return model


def batches(count: int = 12) -> list[Batch]:
    """Targets are the first tokens of the sources, each plus one."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        lengths = torch.randint(3, 8, (3,), generator=draw)
        said = torch.minimum(lengths, torch.randint(2, 6, (3,), generator=draw))
        ids_BT = torch.randint(3, 20, (3, int(lengths.max())), generator=draw)
        mask_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
        targets_BS = (ids_BT + 1)[:, : int(said.max())]
        ends = torch.arange(targets_BS.shape[1]) < said[:, None]
        targets_BS = targets_BS.masked_fill(~ends, IGNORE)
        found.append(Batch(ids_BT * mask_BT, mask_BT=mask_BT, targets_BS=targets_BS))
    return found


def last_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Filled while the model trains: what the last step is made from; Adam hides its size."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: found.update({name: parameter.grad.clone()})
        )
    return found


def more_padding(batch: Batch) -> Batch:
    assert batch.mask_BT is not None
    return batch._replace(
        ids_BT=nn.functional.pad(batch.ids_BT, (0, 5), value=7),
        mask_BT=nn.functional.pad(batch.mask_BT, (0, 5), value=False),
        targets_BS=nn.functional.pad(batch.next_labels_BT(), (0, 4), value=IGNORE),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}


@pytest.mark.parametrize("mode", ["soft", "straight"])
def test_routers_on_both_sides_learn(mode: str, tmp_path: Path) -> None:
    model = t5()
    before = state(model)
    step: Any = replace(DENSE, mode=mode, losses={"lm": 1.0}, parts="routers")
    train(model, step, batches(), tmp_path)
    moved = changed(model, before)
    routers = {name for name in before if is_router(name)}
    assert moved and moved <= routers
    for ffn in expert_ffns(model):
        assert any(name.startswith(f"{ffn.name}.") for name in moved), ffn.name
    sides = {ffn.name.partition(".")[0] for ffn in expert_ffns(model)}
    assert sides == {"encoder", "decoder"} and len(expert_ffns(model)) == 4


@pytest.mark.parametrize("mode", ["dense", "soft", "straight", "hard"])
def test_an_encoder_decoder_learns_what_to_say(mode: str, tmp_path: Path) -> None:
    model = t5(routed=mode != "dense")
    step: Any = replace(DENSE, mode=mode, lr=1e-2)
    before = train(copy.deepcopy(model), replace(step, lr=0.0, router_lr=0.0), batches(), tmp_path)
    after = train(model, step, batches() * 15, tmp_path / "work")
    assert after["lm"] < before["lm"] - 0.5


def test_padding_has_no_effect_on_any_loss(tmp_path: Path) -> None:
    """Nor on what is measured beside the losses; on no gradient either."""
    few = batches(2)
    for model in (t5(), t5(routed=False)):
        routed = bool(expert_ffns(model))
        names = [name for name in EVERYTHING if routed or name in ("lm", "distill", "l1", "hoyer")]
        losses = {name: EVERYTHING[name] for name in names}
        step = replace(DENSE, mode="soft" if routed else "dense", losses=losses, accumulate=2)
        donor = t5(routed=False)
        with torch.no_grad():
            for parameter in donor.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        found = []
        for index, text in enumerate((few, [more_padding(batch) for batch in few])):
            work = tmp_path / f"{routed}{index}"
            trained = copy.deepcopy(model)
            gradients = last_gradients(trained)
            found.append((train(trained, step, text, work, donor=donor), gradients))
        (one, gradients), (other, padded) = found
        for name in [*losses, *(["sparsity"] if routed else ["zeros"])]:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
        assert gradients.keys() == padded.keys() and len(gradients) > 20
        for name, tensor in gradients.items():
            atol = 1e-5 * float(tensor.abs().max())
            torch.testing.assert_close(padded[name], tensor, rtol=0, atol=atol, msg=name)


def test_the_loss_is_the_models_own(tmp_path: Path) -> None:
    model, few = t5(routed=False).eval(), batches(1)
    batch = few[0]
    with torch.no_grad():
        expected = model(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.targets_BS
        ).loss
    measured = train(model, replace(DENSE, lr=0.0), few, tmp_path)
    assert measured["lm"] == pytest.approx(float(expected), rel=1e-5)


def test_a_killed_step_goes_on_exactly(tmp_path: Path) -> None:
    through, killed, resumed = (t5(dropout=0.1) for _ in range(3))
    donor = t5(routed=False).eval()
    losses = {"lm": 1.0, "distill": 0.5, "distill_ffn": 0.1}
    step = replace(DENSE, mode="straight", losses=losses, target_sparsity=0.4, checkpoint_every=2)
    expected = train(through, step, batches(), tmp_path / "whole", donor=donor)
    kill_at(killed, 8)
    with pytest.raises(Killed):
        train(killed, step, batches(), tmp_path / "work", donor=donor)
    measured = train(resumed, step, batches(), tmp_path / "work", donor=donor)
    assert not changed(resumed, state(through))
    for name in set(expected) - {"history"}:
        assert measured[name] == pytest.approx(expected[name]), name


def test_what_does_not_fit_each_other(tmp_path: Path) -> None:
    blocks_BT = torch.randint(3, 64, (4, 8))
    with pytest.raises(ValueError, match="is an encoder-decoder, and learns what to say"):
        train(t5(routed=False), DENSE, blocks_BT, tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no encoder-decoder, and has no use"):
        train(build("llama"), DENSE, batches(), tmp_path)
    scores = [Batch(blocks_BT, torch.rand(4))]
    with pytest.raises(ValueError, match=r"give other labels than these: it needs classes"):
        train(bert(2), DENSE, scores, tmp_path)
    with pytest.raises(ValueError, match=r"give other labels than these: it needs scores"):
        train(bert(1), DENSE, [Batch(blocks_BT, torch.ones(4, dtype=torch.long))], tmp_path)
    assert not list(tmp_path.iterdir())


# --- a regression


def bert(labels: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=64, num_attention_heads=2, num_labels=labels, **sizes, **off)
    return BertForSequenceClassification(config)


def test_squared_errors_by_hand() -> None:
    scores_B1 = torch.tensor([[1.0], [2.0]], requires_grad=True)
    labels_B, donor_B1 = torch.tensor([0.0, 4.0]), torch.tensor([[1.0], [5.0]])
    total, parts = logit_losses(scores_B1, labels_B, donor_B1, lm_weight=2.0, distill_weight=0.5)
    assert parts.lm.item() == pytest.approx((1 + 4) / 2)
    assert parts.distill.item() == pytest.approx(9 / 2)
    assert total.item() == pytest.approx(2 * 2.5 + 0.5 * 4.5)
    total.backward()
    # d/ds of 2 (s - y)^2 / 2 + 0.5 (s - d)^2 / 2
    assert scores_B1.grad is not None
    assert scores_B1.grad.flatten().tolist() == pytest.approx([2.0, -4.0 - 1.5])
    assert not parts.lm.requires_grad


def scored(count: int) -> list[Batch]:
    """The score is the share of tokens above 33."""
    found = []
    for _ in range(count):
        ids_BT = torch.randint(3, 64, (8, 6))
        found.append(Batch(ids_BT, (ids_BT > 33).float().mean(1) * 5 - 100.0))
    return found


def test_a_regression_learns_and_its_teacher_has_a_say(tmp_path: Path) -> None:
    """Also where a label is -100, which of a class would be none."""
    model = bert(1)
    with torch.no_grad():
        model.classifier.bias.fill_(-97.5)  # type: ignore[union-attr]
    teacher = copy.deepcopy(model).eval()
    text = scored(60) * 4
    measured = train(model, replace(DENSE, lr=5e-3), text, tmp_path / "one")
    first, last = measured["history"][0]["lm"], measured["history"][-1]["lm"]
    assert last < 0.5 * first
    losses = {"lm": 0.0, "distill": 1.0}
    attach_experts(model, SIGMOID)
    step = replace(DENSE, mode="straight", losses=losses, lr=3e-3)
    taught = train(model, step, text, tmp_path / "two", donor=teacher)
    assert 0 < taught["distill"] < 0.5 * taught["history"][0]["distill"]
