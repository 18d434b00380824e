"""Selection by the prompt, held against a dense model whose unchosen neurons are cut by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools import select_by_prompt
from moe_tools.data.generate import cache_name
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.hosts.ffn import find_ffns, unfused_ffns
from moe_tools.inference.optimized import optimize
from moe_tools.inference.prompt import prompt_selected
from moe_tools.inference.prompt_ffn import PromptFFN
from tests.families import MOE, NEURONS, TABLE, THRESHOLD, build

ENCODERS = ("bert", "roberta", "t5-relu", "t5-gated")
CAUSAL = [name for name in TABLE if name not in ENCODERS]
every_family = pytest.mark.parametrize("family", CAUSAL)
STEPS = 4
CLOSE = 1e-5
"""What another order of the sums may move; logits of these models are below 10."""


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def dense(family: str = "llama", **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return build(family, **config)


@torch.no_grad()
def continued(
    model: PreTrainedModel, prompt_BT: Tensor, rest_BS: Tensor, chunks: tuple[int, ...] = ()
) -> Tensor:
    """Logits for every token of the rest, one a pass, after a prompt in passes of these sizes."""
    name, cache = cache_name(model), None
    for ids in prompt_BT.split(chunks or prompt_BT.shape[1], dim=1):
        cache = model(input_ids=ids, use_cache=True, **{name: cache})[name]
    found = []
    for ids in rest_BS.split(1, dim=1):
        output = model(input_ids=ids, use_cache=True, **{name: cache})
        cache = output[name]
        found.append(output.logits)
    return torch.cat(found, dim=1)


def by_hand(model: PreTrainedModel, prompt_T: Tensor, share: float) -> list[set[int]]:
    """What GRIFFIN's statistic selects, of one sequence: all, where an expert saw no token."""
    ffns, hidden = unfused_ffns(model), {}
    hooks = [
        ffn.down.register_forward_pre_hook(
            lambda _, args, i=i: hidden.setdefault(i, args[0].flatten(0, -2))
        )
        for i, ffn in enumerate(ffns)
    ]
    with torch.no_grad():
        model(input_ids=prompt_T[None])
    for hook in hooks:
        hook.remove()
    found = []
    for index, ffn in enumerate(ffns):
        h_TF = hidden.get(index, torch.zeros(0, ffn.neurons))
        if not len(h_TF):
            found.append(set(range(ffn.neurons)))
            continue
        statistic_F = (h_TF / h_TF.norm(dim=1, keepdim=True)).norm(dim=0)
        found.append(set(statistic_F.topk(round(share * ffn.neurons)).indices.tolist()))
    return found


@torch.no_grad()
def cut(model: PreTrainedModel, kept: list[set[int]]) -> None:
    """Takes the other neurons out of the way down, for good."""
    for ffn, neurons in zip(unfused_ffns(model), kept, strict=True):
        off = [one for one in range(ffn.neurons) if one not in neurons]
        ffn.views().down_FD[off] = 0


@torch.no_grad()
def continued_by_hand(
    model: PreTrainedModel, prompt_BT: Tensor, rest_BS: Tensor, kept: list[set[int]]
) -> Tensor:
    """The same logits: the prompt on all neurons, the rest on those that are kept."""
    name = cache_name(model)
    model = copy.deepcopy(model)
    cache = model(input_ids=prompt_BT, use_cache=True)[name]
    cut(model, kept)
    steps = [
        model(input_ids=ids, use_cache=True, **{name: cache}).logits
        for ids in rest_BS.split(1, dim=1)
    ]
    return torch.cat(steps, dim=1)


def chosen(ffns: list[PromptFFN]) -> list[set[int]]:
    return [set(ffn.chosen_K().tolist()) for ffn in ffns]


@every_family
def test_it_continues_as_a_model_that_is_cut_to_the_neurons_of_its_prompt(family: str) -> None:
    model, prompt, rest = dense(family), text(1, 9), text(1, STEPS, seed=1)
    unfused_ffns(model)
    kept = by_hand(model, prompt[0], 0.25)
    expected = continued_by_hand(model, prompt, rest, kept)
    with select_by_prompt(model, 0.25) as ffns:
        found = continued(model, prompt, rest)
        assert chosen(ffns) == kept
    assert (found - expected).abs().max() <= CLOSE
    assert (found - continued(model, prompt, rest)).abs().max() > 1e-3  # which is dense again


@every_family
def test_with_every_neuron_it_is_the_dense_model_to_the_bit(family: str) -> None:
    model, prompt, rest = dense(family), text(2, 9), text(2, STEPS, seed=1)
    unfused_ffns(model)  # the host's own way to run fused experts rounds otherwise
    expected = continued(model, prompt, rest)
    with select_by_prompt(model, 1.0):
        assert torch.equal(continued(model, prompt, rest), expected)


@every_family
def test_afterwards_the_model_is_what_it_was(family: str) -> None:
    model = dense(family)
    unfused_ffns(model)
    modules, state = list(model.named_modules()), model.state_dict()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), select_by_prompt(model):
        continued(model, text(1, 5), text(1, 2))
        raise KeyboardInterrupt
    assert list(model.named_modules()) == modules
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)


@every_family
def test_whole_texts_are_computed_as_they_are_generated(family: str) -> None:
    """By `prompt_selected`; every sequence has a selection of its own there."""
    model, ids = dense(family), text(2, 9 + STEPS)
    with select_by_prompt(model, 0.25), torch.no_grad():
        steps = [continued(model, row[None, :9], row[None, 9:]) for row in ids]
    with prompt_selected(model, 0.25, 9), torch.no_grad():
        whole = model(input_ids=ids).logits
        prompt = model(input_ids=ids[:, :9]).logits
    with torch.no_grad():
        assert torch.equal(prompt, model(input_ids=ids[:, :9]).logits)
    assert (whole[:, :9] - prompt).abs().max() <= CLOSE
    assert (whole[:, 9:] - torch.cat(steps)).abs().max() <= CLOSE


@every_family
def test_a_batch_runs_what_any_of_its_sequences_selected(family: str) -> None:
    model, prompt, rest = dense(family), text(3, 9), text(3, STEPS, seed=1)
    unfused_ffns(model)
    alone = [by_hand(model, row, 0.125) for row in prompt]
    union = [set.union(*each) for each in zip(*alone, strict=True)]
    expected = continued_by_hand(model, prompt, rest, union)
    with select_by_prompt(model, 0.125) as ffns:
        found = continued(model, prompt, rest)
        assert chosen(ffns) == union
    assert (found - expected).abs().max() <= CLOSE


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 12),
    batch=st.integers(1, 3),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(2, 5), max_size=4),
)
def test_chunks_of_a_prompt_select_what_the_whole_does(
    length: int, batch: int, share: float, seed: int, sizes: list[int]
) -> None:
    """And so does a prompt of one token."""
    model, prompt, rest = dense(), text(batch, length, seed=seed), text(batch, 2, seed=seed + 1)
    chunks: list[int] = []
    for size in sizes:
        if sum(chunks) + size <= length - 2:
            chunks.append(size)
    chunks.append(length - sum(chunks))
    with select_by_prompt(model, share) as ffns:
        whole = continued(model, prompt, rest)
        kept = chosen(ffns)
        parts = continued(model, prompt, rest, tuple(chunks))
        assert chosen(ffns) == kept
    assert all(len(one) >= max(1, round(share * NEURONS)) for one in kept)
    assert (whole - parts).abs().max() <= CLOSE


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def generated(model: PreTrainedModel, ids_BT: Tensor, **options: Any) -> Tensor:
    host: Any = model
    return host.generate(input_ids=ids_BT, **GREEDY | options)[:, ids_BT.shape[1] :]


@every_family
def test_generate_begins_anew_with_every_prompt(family: str) -> None:
    model, first, second = dense(family), text(1, 7), text(1, 11, seed=5)
    fresh = []
    for prompt in (first, second):
        with select_by_prompt(model, 0.25) as ffns:
            fresh.append((generated(model, prompt), chosen(ffns)))
    with select_by_prompt(model, 0.25) as ffns:
        again = [(generated(model, prompt), chosen(ffns)) for prompt in (first, second)]
    assert [one.tolist() for one, _ in fresh] == [one.tolist() for one, _ in again]
    assert [kept for _, kept in fresh] == [kept for _, kept in again]
    assert fresh[0][1] != fresh[1][1]


@every_family
def test_greedy_tokens_of_every_neuron_are_the_dense_ones(family: str) -> None:
    model, prompt = dense(family), text(2, 7)
    expected = generated(model, prompt)
    with select_by_prompt(model, 1.0):
        assert torch.equal(generated(model, prompt), expected)


def test_padding_selects_nothing() -> None:
    """Left of a shorter prompt of a batch, whatever the padding is."""
    model, short, long = dense(), text(1, 5), text(1, 9, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with select_by_prompt(model, 0.25) as ffns:
        kept = []
        for prompt in (short, long):
            generated(model, prompt)
            kept.append(chosen(ffns))
        for padding in (0, 7):
            padded = torch.cat([torch.full((1, 4), padding), short], dim=1)
            generated(model, torch.cat([padded, long]), attention_mask=mask)
            assert chosen(ffns) == [one | two for one, two in zip(*kept, strict=True)]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches_select_the_same(options: dict[str, Any]) -> None:
    model, prompt = dense(), text(2, 7)
    with select_by_prompt(model, 0.25) as ffns:
        generated(model, prompt)
        kept = chosen(ffns)
        generated(model, prompt, **options)
        assert chosen(ffns) == kept


def test_beams_continue_as_those_of_a_model_that_is_cut() -> None:
    model, prompt = dense(), text(1, 7)
    with select_by_prompt(model, 0.5) as ffns:
        found = generated(model, prompt, num_beams=3)
        kept = chosen(ffns)
    naive = copy.deepcopy(model)
    # the prompt itself is dense: only what follows may be cut
    downs = [ffn.down for ffn in find_ffns(naive)]
    for down, neurons in zip(downs, kept, strict=True):
        off = torch.tensor([one not in neurons for one in range(NEURONS)])
        down.register_forward_pre_hook(
            lambda _, args, off=off: (
                args[0].masked_fill(off, 0) if args[0].shape[1] == 1 else args[0],
            )
        )
    assert torch.equal(found, generated(naive, prompt, num_beams=3))


def test_generate_can_prefill_in_chunks() -> None:
    model, prompt = dense(), text(1, 9)
    with select_by_prompt(model, 0.25) as ffns:
        expected, kept = generated(model, prompt), chosen(ffns)
        assert torch.equal(generated(model, prompt, prefill_chunk_size=3), expected)
        assert chosen(ffns) == kept


def test_the_next_turn_of_a_talk_is_a_prompt_too() -> None:
    """The tokens of both turns decide then; those generated between them do not."""
    model, turns, answer = dense(), text(1, 12).split(6, dim=1), text(1, 3, seed=3).split(1, dim=1)
    name, cache, seen = cache_name(model), None, list[list[Tensor]]([[], []])
    with select_by_prompt(model, 0.25) as ffns, torch.no_grad():
        for ffn, hidden in zip(ffns, seen, strict=True):
            ffn.down.register_forward_pre_hook(
                lambda _, args, hidden=hidden: hidden.append(args[0][0])
            )
        kept = []
        for ids in (turns[0], answer[0], turns[1], answer[1], answer[2]):
            cache = model(input_ids=ids, use_cache=True, **{name: cache})[name]
            kept.append(chosen(ffns))
    assert kept[0] == kept[1] != kept[2]
    assert kept[2] == kept[3] == kept[4]
    for chosen_K, hidden in zip(kept[2], seen, strict=True):
        h_TF = torch.cat(hidden)
        assert len(h_TF) == 12
        statistic_F = (h_TF / h_TF.norm(dim=1, keepdim=True)).norm(dim=0)
        assert chosen_K == set(statistic_F.topk(12).indices.tolist())


def test_a_single_token_without_a_cache_is_a_prompt() -> None:
    model, prompt = dense(), text(1, 1)
    with torch.no_grad():
        expected = model(input_ids=prompt).logits
        with select_by_prompt(model, 0.1):
            continued(model, text(1, 5), text(1, 2))
            assert torch.equal(model(input_ids=prompt).logits, expected)


def test_neurons_that_ran_are_counted() -> None:
    model = dense()
    with select_by_prompt(model, 0.25) as ffns:
        generated(model, text(1, 7))
        assert [(ffn.ran, ffn.could) for ffn in ffns] == [(7 * 12, 7 * NEURONS)] * 2
        generated(model, text(1, 7), max_new_tokens=1, min_new_tokens=1)
        assert [(ffn.ran, ffn.could) for ffn in ffns] == [(0, 0)] * 2


def test_adapters_are_in_the_smaller_ffn() -> None:
    from peft import LoraConfig, get_peft_model

    model, prompt, rest = dense(), text(1, 9), text(1, STEPS, seed=1)
    config = LoraConfig(target_modules=["up_proj", "gate_proj", "down_proj"], r=4)
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = continued_by_hand(merged, prompt, rest, by_hand(merged, prompt[0], 0.25))
    with select_by_prompt(model, 0.25):
        assert (continued(model, prompt, rest) - expected).abs().max() <= 10 * CLOSE


def test_quantised_linears_are_selected_from() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = dense(hidden_size=64, intermediate_size=128)
    quantize_(model, Int8WeightOnlyConfig())
    prompt, rest = text(1, 9), text(1, STEPS, seed=1)
    kept = by_hand(model, prompt[0], 0.25)
    name = cache_name(model)
    with torch.no_grad():  # a way down that is dequantised, without the columns of the others
        naive = copy.deepcopy(model)
        cache = naive(input_ids=prompt, use_cache=True)[name]
        for ffn, neurons in zip(find_ffns(naive), kept, strict=True):
            off = [one for one in range(ffn.neurons) if one not in neurons]
            weight = ffn.weights().down_FD.clone()
            weight[off] = 0
            ffn.down.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        expected = torch.cat(
            [
                naive(input_ids=ids, use_cache=True, **{name: cache}).logits
                for ids in rest.split(1, dim=1)
            ],
            dim=1,
        )
    with select_by_prompt(model, 0.25) as ffns:
        found = continued(model, prompt, rest)
        assert chosen(ffns) == kept
    assert (found - expected).abs().max() <= 10 * CLOSE
    exact = continued(model, prompt, rest)
    with select_by_prompt(model, 1.0):
        assert torch.equal(continued(model, prompt, rest), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype: torch.dtype) -> None:
    model, prompt, rest = dense().to(dtype), text(1, 9), text(1, STEPS, seed=1)
    expected = continued_by_hand(model, prompt, rest, by_hand(model, prompt[0], 0.5))
    with select_by_prompt(model, 0.5):
        found = continued(model, prompt, rest)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 0.1


def test_a_copy_has_a_prompt_of_its_own() -> None:
    """Deep copies and pickles of a model that selects go on by themselves."""
    model, first, second, rest = dense(), text(1, 7), text(1, 7, seed=2), text(1, 3)
    with select_by_prompt(model, 0.25):
        expected = [continued(model, prompt, rest) for prompt in (first, second)]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            name = cache_name(model)
            with torch.no_grad():
                cache = model(input_ids=first, use_cache=True)[name]
                assert torch.equal(continued(other, second, rest), expected[1])
                output = model(input_ids=rest[:, :1], use_cache=True, **{name: cache})
            assert torch.equal(output.logits, expected[0][:, :1])


def said(model: PreTrainedModel, prompt: Tensor, rest: Tensor) -> str:
    with pytest.raises(ValueError) as error:
        continued(model, prompt, rest)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_shares_are_above_0_and_at_most_1(share: float) -> None:
    model = dense()
    with (
        pytest.raises(ValueError, match=r"share is .*, but must be above 0"),
        select_by_prompt(model, share),
    ):
        pass


@pytest.mark.parametrize("family", ENCODERS)
def test_models_that_continue_no_text_are_refused(family: str) -> None:
    model = dense(family)
    with pytest.raises(ValueError, match="continues no text"), select_by_prompt(model):
        pass
    with pytest.raises(ValueError, match="continues no text"), prompt_selected(model, 0.5, 4):
        pass


def test_routed_and_optimised_models_are_refused() -> None:
    model = dense()
    attach_experts(model, THRESHOLD)
    with (
        pytest.raises(ValueError, match=r"is routed, which .* routed=False"),
        select_by_prompt(model),
    ):
        pass
    model = dense(hidden_act="relu")
    optimize(model)
    with pytest.raises(ValueError, match="is optimised already"), select_by_prompt(model):
        pass


def test_it_cannot_be_optimised_converted_or_trained_meanwhile() -> None:
    model = dense(hidden_act="relu")
    with select_by_prompt(model):
        for change in (
            optimize,
            lambda model: attach_experts(model, Conversion(**vars(THRESHOLD))),
            lambda model: select_by_prompt(model).__enter__(),
        ):
            with pytest.raises(ValueError, match="selecting its neurons by the prompt already"):
                change(model)
        model.train()
        assert "for inference alone" in said(model, text(1, 5), text(1, 1))


def test_a_cache_of_another_prompt_is_refused() -> None:
    model, name, rest = dense(), cache_name(dense()), text(1, 1)
    with torch.no_grad():
        outside = model(input_ids=text(1, 5), use_cache=True)[name]
        with select_by_prompt(model, 0.25):
            with pytest.raises(ValueError, match=r"holds 5 tokens, but the prompt .* has 0 "):
                model(input_ids=rest, use_cache=True, **{name: outside})
            first = model(input_ids=text(1, 5), use_cache=True)[name]
            model(input_ids=text(1, 5, seed=1), use_cache=True)
            with pytest.raises(ValueError, match="run every prompt from its start"):
                model(input_ids=rest, use_cache=True, **{name: first})
            last = model(input_ids=text(1, 5, seed=1), use_cache=True)[name]
            last.crop(-2)
            with pytest.raises(ValueError, match=r"holds 3 tokens, but .* has 5 "):
                model(input_ids=rest, use_cache=True, **{name: last})


def test_assisted_decoding_is_refused_or_dense() -> None:
    """A pass over candidates looks like a prompt; one that was rejected shows in the cache."""
    model, helper = dense(), build("llama")
    with (
        select_by_prompt(model, 0.25),
        pytest.raises(ValueError, match="without an assistant model or prompt lookup"),
    ):
        generated(model, text(1, 7), assistant_model=helper, max_new_tokens=30)


def test_other_sequences_cannot_join_a_prompt() -> None:
    model, name = dense(), cache_name(dense())
    with torch.no_grad(), select_by_prompt(model, 0.25):
        cache = model(input_ids=text(1, 5), use_cache=True)[name]
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="a prompt of 1 sequences goes on with 2"):
            model(input_ids=text(2, 3), use_cache=True, **{name: cache})


def test_a_model_that_moved_has_to_see_its_prompt_again() -> None:
    model, name = dense(), cache_name(dense())
    with torch.no_grad(), select_by_prompt(model, 0.25):
        cache = model(input_ids=text(1, 5), use_cache=True)[name]
        model.to(torch.float64)
        with pytest.raises(ValueError, match=r"holds 5 tokens"):
            model(input_ids=text(1, 1), use_cache=True, **{name: cache})


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt of 0 tokens"), prompt_selected(dense(), 0.5, 0):
        pass


@pytest.mark.parametrize("family", MOE)
def test_an_expert_that_saw_no_token_keeps_all_its_neurons(family: str) -> None:
    model = dense(family)
    with select_by_prompt(model, 0.125) as ffns:
        continued(model, text(1, 1), text(1, 30))
        kept = [len(ffn.chosen_K()) for ffn in ffns]
    few = round(0.125 * NEURONS)
    assert set(kept) == {few, NEURONS}
