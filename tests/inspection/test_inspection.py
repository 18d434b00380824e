"""Every figure of an inspection against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch

import moe_tools
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.intervene import intervene
from moe_tools.experts.routing import record_routing, routing_sparsity
from moe_tools.inspection import effect, inspecting, overlap
from moe_tools.inspection.kept import Kept
from moe_tools.inspection.tally import NEAR
from tests.cli.test_verbs import WORDS, build_tokenizer
from tests.families import EXPERT_SIZE, EXPERTS, MOE, UNEVEN, build, of_size, randomize, routed

inspect = moe_tools.inspect
FIRST = "model.layers.0.mlp"


def tiny(family="llama", size=EXPERT_SIZE, **config):
    model, _ = routed(build(family, **config), of_size(size))
    randomize(model)
    return model


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def blocks_BT():
    return torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(2))


def recorded(model, *batches):
    """FFN -> scores_TE and mask_TE of all batches."""
    with record_routing(model) as records, torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    return {
        name: [
            torch.cat([getattr(r, field).flatten(0, -2) for r in records if r.ffn == name])
            for field in ("scores_TE", "mask_TE")
        ]
        for name in dict.fromkeys(record.ffn for record in records)
    }


def norms_by_hand(model, blocks_BT):
    """FFN -> ||E_e(x)||, expert by expert."""
    inputs = {}
    handles = [
        ffn.register_forward_pre_hook(lambda f, args: inputs.update({f.name: args[0]}))
        for ffn in expert_ffns(model)
    ]
    with torch.no_grad():
        model(input_ids=blocks_BT)
    for handle in handles:
        handle.remove()
    found = {}
    for ffn in expert_ffns(model):
        h_TF = ffn.hidden(inputs[ffn.name]).flatten(0, -2).detach()
        down_FD = ffn.weights().down_FD.detach()
        parts = zip(
            h_TF.split(ffn.division.sizes, dim=-1), down_FD.split(ffn.division.sizes), strict=True
        )
        found[ffn.name] = torch.stack([(h @ down).norm(dim=-1) for h, down in parts], dim=-1)
    return found


@pytest.mark.parametrize("size", [EXPERT_SIZE, UNEVEN])
def test_summaries_and_experts_are_those_counted_by_hand(blocks_BT, size):
    model = tiny(size=size)
    norms = norms_by_hand(model, blocks_BT)
    found = inspect(model, blocks_BT, batch_size=2)
    assert found.tokens == blocks_BT.numel()
    rows = {(row.ffn, row.expert): row for row in found.experts}
    for summary, (name, (scores_TE, mask_TE)) in zip(
        found.summaries, recorded(model, blocks_BT).items(), strict=True
    ):
        sizes = torch.tensor(expert_ffns(model)[0].division.sizes)
        share_TE = norms[name] * mask_TE / norms[name].sum(1, keepdim=True)
        load_E = mask_TE.float().mean(0)
        p_E = load_E / load_E.sum()
        assert summary.ffn == name and summary.tokens == 45
        assert summary.sparsity == pytest.approx(1 - (mask_TE * sizes).sum().item() / (45 * 48))
        assert summary.experts_on == pytest.approx(mask_TE.sum().item() / 45)
        assert summary.dead == int((load_E == 0).sum())
        assert summary.always_on == int((load_E == 1).sum())
        entropy = -(p_E * p_E.clamp_min(1e-30).log()).sum() / math.log(len(sizes))
        assert summary.entropy == pytest.approx(entropy.item(), abs=1e-6)
        near = ((scores_TE - 0.5).abs() < NEAR).float().mean().item()
        assert summary.near == pytest.approx(near)
        assert summary.captured == pytest.approx(share_TE.sum(1).mean().item(), rel=1e-4)
        for expert in range(len(sizes)):
            row = rows[name, expert]
            assert row.neurons == sizes[expert] and row.load == pytest.approx(load_E[expert].item())
            assert row.score == pytest.approx(scores_TE[:, expert].mean().item(), rel=1e-5)
            mass = norms[name][:, expert].sum() / norms[name].sum()
            assert row.mass == pytest.approx(mass.item(), rel=1e-4)
    with record_routing(model) as records, torch.no_grad():
        model(input_ids=blocks_BT)
    assert found.sparsity == pytest.approx(routing_sparsity(records))


def test_an_expert_is_dead_used_or_always_on(model, blocks_BT):
    with intervene(model, on={0: [1]}, off={0: [2]}):
        found = inspect(model, blocks_BT)
    uses = [row.use for row in found.experts][:EXPERTS]
    assert uses[1] == "always on" and uses[2] == "dead"
    first = found.summaries[0]
    assert first.dead == uses.count("dead") and first.always_on == uses.count("always on")


def test_a_token_has_its_scores_margin_and_captured_mass(model, blocks_BT):
    norms = norms_by_hand(model, blocks_BT)
    found = inspect(model, blocks_BT)
    expected = recorded(model, blocks_BT)
    decisions = {(row.ffn, row.token): row for row in found.decisions}
    assert len(decisions) == 2 * 45
    for name, (scores_TE, mask_TE) in expected.items():
        table = found.scores(name)
        torch.testing.assert_close(torch.tensor(table.column("score")), scores_TE.flatten())
        margins = torch.tensor(table.column("margin"))
        torch.testing.assert_close(margins, scores_TE.flatten() - 0.5)
        assert torch.equal(torch.tensor(table.column("selected")), mask_TE.flatten())
        assert (table[13].token, table[13].expert) == (2, 1)
        for token in range(45):
            row = decisions[name, token]
            on_E = mask_TE[token]
            nearest = (scores_TE[token] - 0.5).abs().argmin()
            share = (norms[name][token] * on_E).sum() / norms[name][token].sum()
            assert row.experts == tuple(on_E.nonzero()[:, 0].tolist())
            assert row.on == pytest.approx(on_E.float().mean().item())
            assert row.margin == pytest.approx((scores_TE[token, nearest] - 0.5).item(), abs=1e-6)
            assert row.captured == pytest.approx(share.item(), rel=1e-4)
            assert row.text == f"<{blocks_BT.flatten()[token].item()}>"


def test_pairs_of_experts_are_counted(model, blocks_BT):
    _, mask_TE = recorded(model, blocks_BT)[FIRST]
    table = inspect(model, blocks_BT, batch_size=2).coselection(0)
    assert len(table) == EXPERTS * (EXPERTS - 1) // 2
    for row in table:
        one, other = mask_TE[:, row.expert], mask_TE[:, row.other]
        assert row.expert < row.other and row.both == int((one & other).sum())
        assert row.jaccard == pytest.approx(row.both / max(1, int((one | other).sum())))
        chance = one.float().mean() * other.float().mean()
        if chance:
            assert row.lift == pytest.approx((row.both / 45 / chance).item(), rel=1e-5)
        else:
            assert math.isnan(row.lift)


def test_margins_are_counted_around_the_threshold(model, blocks_BT):
    found = inspect(model, blocks_BT, batch_size=1)
    for name, (scores_TE, _) in recorded(model, blocks_BT).items():
        bins = [row for row in found.margins if row.ffn == name]
        assert sum(row.count for row in bins) == scores_TE.numel()
        margin_TE = scores_TE - 0.5
        for row in bins:
            inside = (margin_TE >= row.low) & (margin_TE < row.high)
            assert row.count == int(inside.sum())
        assert 0.0 in [row.low for row in bins]


def test_an_expert_responds_to_its_highest_scores_with_their_context(model, blocks_BT):
    found = inspect(model, blocks_BT, batch_size=2, top=3)
    for name, (scores_TE, mask_TE) in recorded(model, blocks_BT).items():
        for expert in range(EXPERTS):
            rows = found.responses(name, expert)
            best = scores_TE[:, expert].topk(3)
            assert [row.token for row in rows] == best.indices.tolist()
            assert [row.rank for row in rows] == [0, 1, 2]
            for row, score in zip(rows, best.values.tolist(), strict=True):
                block, place = blocks_BT[row.token // 9].tolist(), row.token % 9
                assert row.score == pytest.approx(score)
                assert row.selected == bool(mask_TE[row.token, expert])
                assert row.text == f"<{block[place]}>"
                assert row.before == "".join(f"<{token}>" for token in block[:place])
                assert row.after == "".join(f"<{t}>" for t in block[place + 1 : place + 5])


@pytest.mark.parametrize("family", ["llama", "bert", "t5-relu", "gpt2", "qwen2_moe", *MOE[:1]])
def test_inspecting_changes_no_logit_and_leaves_no_hook(family):
    model = tiny(family)
    inputs = {"input_ids": torch.randint(3, 64, (2, 9))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        expected = model(**inputs).logits
        with inspecting(model) as found:
            assert torch.equal(model(**inputs).logits, expected)
        seen = found.tokens
        model(**inputs)
    assert found.tokens == seen == 18 * (2 if model.config.is_encoder_decoder else 1)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(ffn.observers for ffn in expert_ffns(model))


def test_nothing_stays_behind_after_an_exception(model):
    with pytest.raises(ArithmeticError), inspecting(model):
        raise ArithmeticError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(ffn.observers for ffn in expert_ffns(model))


def test_generation_with_a_cache_is_one_pass_over_the_text(model):
    prompt = torch.randint(3, 64, (2, 5))
    with inspecting(model, top=2) as stepwise, torch.no_grad():
        text = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
            min_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
    seen = text[:, :-1]  # the last token is never read
    assert stepwise.tokens == seen.numel()
    whole = inspect(model, seen, top=2)
    for row, other in zip(stepwise.experts, whole.experts, strict=True):
        assert row.load == other.load and row.score == pytest.approx(other.score, rel=1e-4)
    for step, once in zip(stepwise.summaries, whole.summaries, strict=True):
        assert step.captured == pytest.approx(once.captured, rel=1e-4)
    context = [
        [(row.before, row.text) for expert in range(4) for row in seen.responses(0, expert)]
        for seen in (stepwise, whole)
    ]
    assert context[0] == context[1]


def padded(text, side, width=9):
    """The text with padding, and its mask."""
    fill = torch.zeros(1, width - text.shape[1], dtype=torch.long)
    parts = [(fill, fill), (text, torch.ones_like(text))]
    ids, mask = zip(*(parts if side == "left" else parts[::-1]), strict=True)
    return torch.cat(ids, dim=1), torch.cat(mask, dim=1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(family, side):
    model, text = tiny(family), torch.randint(3, 64, (1, 6))
    ids, mask = padded(text, side)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with inspecting(model) as found, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=position)
    assert found.tokens == 6
    check_alike(found, inspect(model, text))


def check_alike(found, expected):
    for row, other in zip(found.experts, expected.experts, strict=True):
        assert row.load == other.load and row.score == pytest.approx(other.score, rel=1e-4)
        assert row.mass == pytest.approx(other.mass, rel=1e-4, nan_ok=True)
    rows = [(row.ffn, row.token, row.text, row.experts) for row in found.decisions]
    others = [(row.ffn, row.token, row.text, row.experts) for row in expected.decisions]
    assert sorted(rows) == sorted(others)


def test_padding_is_left_out_on_both_sides_of_an_encoder_decoder():
    model = tiny("t5-gated")
    source, target = torch.randint(3, 64, (1, 6)), torch.randint(3, 64, (1, 4))
    (ids, mask), (target_ids, target_mask) = padded(source, "right"), padded(target, "right")
    with inspecting(model) as found, torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=target_ids,
            decoder_attention_mask=target_mask,
        )
    with inspecting(model) as expected, torch.no_grad():
        model(input_ids=source, decoder_input_ids=target)
    assert found.tokens == expected.tokens == 6 + 4
    check_alike(found, expected)


def test_the_experts_of_an_moe_host_know_their_own_tokens(blocks_BT):
    model = tiny("mixtral")
    chosen = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "HostExperts":
            module.register_forward_pre_hook(
                lambda _, args, path=path: chosen.update({path: args[1]})
            )
    found = inspect(model, blocks_BT, batch_size=5)
    for summary in found.summaries:
        path, index = summary.ffn.rsplit(".", 1)
        tokens = (chosen[path] == int(index)).any(1).nonzero()[:, 0].tolist()
        rows = [row for row in found.decisions if row.ffn == summary.ffn]
        assert summary.tokens == len(tokens)
        assert sorted(row.token for row in rows) == tokens


def test_an_encoder_and_a_decoder_are_stacks_of_their_own(blocks_BT):
    found = inspect(tiny("t5-relu"), blocks_BT)
    assert found.tokens == 2 * 45
    assert {row.tokens for row in found.summaries} == {45}
    pairs = {(row.ffn.split(".")[0], row.other.split(".")[0]) for row in found.similarity}
    assert pairs == {("encoder", "encoder"), ("decoder", "decoder")}


def test_a_shared_expert_is_always_on_and_has_no_margin(blocks_BT):
    conversion = Conversion(
        "donor", EXPERT_SIZE, "sigmoid", {"kind": "topk", "share": 0.4}, shared_experts=1
    )
    model, _ = routed(build("llama"), conversion)
    randomize(model)
    found = inspect(model, blocks_BT)
    assert found.experts[0].use == "always on" and found.experts[0].score == 1
    assert found.scores(0)[0].margin == math.inf
    routed_scores = 2 * 45 * (EXPERTS - 1)
    assert sum(row.count for row in found.margins) == routed_scores
    scores = found.scores(0)
    routed_rows = scores.where(scores.column("expert") > 0)
    assert (routed_rows.column("selected") == (routed_rows.column("margin") >= 0)).all()


def test_a_layer_is_like_itself_and_one_with_the_same_masks(model):
    blocks_BT = torch.randint(3, 64, (40, 16))
    found = inspect(model, blocks_BT)
    cka = {(row.ffn, row.other): row.cka for row in found.similarity}
    assert cka[FIRST, FIRST] == pytest.approx(1)
    other = "model.layers.1.mlp"
    assert cka[FIRST, other] == cka[other, FIRST] and cka[FIRST, other] < 0.99


def test_aggregates_need_no_more_memory_for_more_tokens(model, blocks_BT):
    def size(found):
        tallies = list(found.tallies.values())
        tensors = [value for tally in tallies for value in vars(tally).values()]
        tensors += [value for tally in tallies for value in vars(tally.responses).values()]
        kept = sum(len(part.scores_TE) for parts in found.kept._parts.values() for part in parts)
        return kept, sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))

    once = inspect(model, blocks_BT, keep=10)
    often = inspect(model, blocks_BT.repeat(20, 1), keep=10)
    assert size(once) == size(often) and size(often)[0] == 2 * 10
    assert often.tokens == 900 and often.summaries[0].tokens == 900
    assert isinstance(often.kept, Kept) and len(often.decisions) == 2 * 10


def test_what_is_not_measured_is_nan(model, blocks_BT):
    found = inspect(model, blocks_BT, norms=False)
    assert math.isnan(found.summaries[0].captured) and math.isnan(found.decisions[0].captured)
    assert math.isnan(found.experts[0].mass)
    optimised = inspect(moe_tools.optimize(model), blocks_BT)
    assert math.isnan(optimised.summaries[0].captured)
    assert [row.load for row in optimised.experts] == [row.load for row in found.experts]


def test_some_ffns_can_be_chosen(model, blocks_BT):
    found = inspect(model, blocks_BT, ffns=[1])
    assert [row.ffn for row in found.summaries] == ["model.layers.1.mlp"]
    with pytest.raises(ValueError, match=r"unknown FFN 'model.layers.0.mlp'"):
        found.coselection(FIRST)
    with pytest.raises(ValueError, match=r"did you mean 'model.layers.0.mlp'"):
        inspect(model, blocks_BT, ffns=["model.layer.0.mlp"])


def test_a_folder_and_a_text(model, tmp_path):
    save(model, tmp_path / "out", build_tokenizer(WORDS))
    found = inspect(tmp_path / "out", "w1 w2 w3")
    assert [row.text for row in found.decisions][:3] == ["w1", "w2", "w3"]
    both = inspect(tmp_path / "out", ["w1 w2", "w3"])
    assert both.tokens == 3


def test_two_texts_and_two_checkpoints_overlap(model, blocks_BT):
    one = inspect(model, blocks_BT)
    for row in overlap(one, one):
        assert (row.load, row.used, row.mask) == (pytest.approx(1), 1, pytest.approx(1))
    other = inspect(model, blocks_BT.flip(0))
    assert all(math.isnan(row.mask) for row in overlap(one, other))
    with intervene(model, off={0: [0]}):
        changed = inspect(model, blocks_BT)
    _, mask_TE = recorded(model, blocks_BT)[FIRST]
    without_TE = mask_TE.clone()
    without_TE[:, 0] = False
    first = overlap(one, changed)[0]
    either_T = mask_TE.sum(1)
    jaccard_T = torch.where(either_T > 0, without_TE.sum(1) / either_T.clamp_min(1), 1.0)
    assert first.mask == pytest.approx(jaccard_T.mean().item(), rel=1e-5)
    p_E, q_E = (m.sum(0) / m.sum() for m in (mask_TE, without_TE))
    assert first.load == pytest.approx(torch.minimum(p_E, q_E).sum().item(), rel=1e-5)
    used, used_without = mask_TE.any(0), without_TE.any(0)
    expected = (used & used_without).sum() / (used | used_without).sum()
    assert first.used == pytest.approx(expected.item())


def test_other_ffns_or_experts_do_not_overlap(model, blocks_BT):
    one = inspect(model, blocks_BT)
    with pytest.raises(ValueError, match="of other FFNs, 2 and 1"):
        overlap(one, inspect(model, blocks_BT, ffns=[0]))
    with pytest.raises(ValueError, match="has 6 and 5 experts"):
        overlap(one, inspect(tiny(size=UNEVEN), blocks_BT))


def test_an_effect_is_the_difference_of_two_runs(model):
    tokenizer, text = build_tokenizer(WORDS), "w1 w5 w9 w5"
    ids = torch.tensor([tokenizer(text)["input_ids"]])

    def log_p():
        with torch.no_grad():
            return model(input_ids=ids).logits[0, :-1].log_softmax(-1)

    before = log_p()
    with intervene(model, off={1: [0, 3]}):
        after = log_p()
    rows = effect(model, tokenizer, text, off={1: [0, 3]})
    assert [row.text for row in rows] == ["w5", "w9", "w5"]
    for row, token, p, q in zip(rows, ids[0, 1:], before, after, strict=True):
        assert row.nats == pytest.approx(-p[token].item(), abs=1e-5)
        assert row.change == pytest.approx((p[token] - q[token]).item(), abs=1e-5)
        assert row.kl == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)
        assert row.best == tokenizer.decode([p.argmax().item()])
        assert row.best_after == tokenizer.decode([q.argmax().item()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"text": " "}, "the text ' ' is empty"),
        ({"text": "w1 " * 81}, "a text of 81 tokens exceeds the context of LlamaForCausalLM, 80"),
        ({"text": torch.zeros(0, 4)}, r"blocks are \(0, 4\)"),
        ({"text": "w1", "tokenizer": None}, "a text needs a tokenizer"),
        ({"text": "w1", "keep": -1}, "keep is -1"),
        ({"text": "w1", "batch_size": 0}, "batch_size is 0"),
        ({"text": "w1", "ffns": []}, "ffns is empty"),
        ({"text": "w1", "ffns": [7]}, "there is no FFN 7"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message):
    model = tiny(max_position_embeddings=80)
    with pytest.raises(ValueError, match=message):
        inspect(model, **{"tokenizer": build_tokenizer(WORDS), **words})


def test_a_dense_model_or_folder_has_nothing_to_inspect(tmp_path):
    dense = build("llama")
    save(dense, tmp_path / "dense", build_tokenizer(WORDS))
    for source in (dense, tmp_path / "dense"):
        with pytest.raises(ValueError, match="has no router to inspect: convert it first"):
            inspect(source, "w1", tokenizer=build_tokenizer(WORDS))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other"):
        inspect(tmp_path / "other", "w1")


def test_embeddings_in_place_of_tokens_are_refused(model):
    with pytest.raises(ValueError, match="pass input_ids"), inspecting(model):
        model(inputs_embeds=torch.zeros(1, 3, 16))
