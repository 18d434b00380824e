"""A batch with padding counts as much as its texts one by one, whatever counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.routing import record_routing, routing_sparsity
from moe_tools.experts.tokens import valid_tokens
from moe_tools.measure.flops import count_flops
from moe_tools.measure.neurons import NeuronCount, count_neurons, sparsity
from moe_tools.measure.predictions import count_predictions
from moe_tools.measure.truncation import truncated
from moe_tools.measure.two_levels import two_levels
from tests.families import THRESHOLD, build, randomize, routed

SHORT, LONG = 4, 7
CAUSAL = ["llama", "opt", "gpt2", "mixtral", "qwen2_moe"]
Batch = dict[str, Tensor]


def make(family: str, **config: Any) -> PreTrainedModel:
    model, _ = routed(build(family, **config))
    randomize(model)
    return model


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (1, n), generator=generator) for n in (SHORT, LONG)]


def padded(side: str) -> Batch:
    """Both texts as one batch; zeros are padding."""
    short, long = texts()
    fill = torch.zeros(1, LONG - SHORT, dtype=torch.long)
    row = torch.cat([fill, short] if side == "left" else [short, fill], 1)
    mask_BT = torch.cat([(row != 0).long(), torch.ones(1, LONG, dtype=torch.long)])
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    ids_BT = torch.cat([row, long])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_BT}


def inputs_for(model: PreTrainedModel, batch: Batch) -> Batch:
    """What its forward pass takes; OPT and BERT have positions of their own."""
    if model.config.model_type in ("opt", "bert"):
        batch = {key: value for key, value in batch.items() if key != "position_ids"}
    if model.config.is_encoder_decoder:
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        twice = {"decoder_input_ids": ids_BT.flip(1), "decoder_attention_mask": mask_BT.flip(1)}
        return {"input_ids": ids_BT, "attention_mask": mask_BT} | twice
    return batch


def alone(model: PreTrainedModel) -> list[Batch]:
    """Each text as a batch of its own, without a mask."""
    if model.config.is_encoder_decoder:
        return [{"input_ids": ids, "decoder_input_ids": ids.flip(1)} for ids in texts()]
    return [{"input_ids": ids} for ids in texts()]


@torch.no_grad()
def record(model: PreTrainedModel, *batches: Batch) -> list[Routing]:
    with record_routing(model) as records:
        for batch in batches:
            model(**batch)
    return records


def totals(records: list[Routing]) -> dict[str, tuple[int, int]]:
    """FFN -> tokens, neurons that ran."""
    found: dict[str, tuple[int, int]] = {}
    for one in records:
        tokens, on = found.get(one.ffn, (0, 0))
        found[one.ffn] = (tokens + one.tokens, on + one.neurons_on)
    return {name: pair for name, pair in found.items() if pair[0]}


SIDES = [(family, side) for family in [*CAUSAL, "t5-gated"] for side in ("left", "right")]
SIDES += [("bert", "right")]
every_padding = pytest.mark.parametrize(("family", "side"), SIDES)


@every_padding
def test_routing_is_counted_as_text_by_text(family: str, side: str) -> None:
    model = make(family)
    together, apart = record(model, inputs_for(model, padded(side))), record(model, *alone(model))
    assert totals(together) == totals(apart)
    assert routing_sparsity(together) == pytest.approx(routing_sparsity(apart), abs=1e-12)
    assert routing_sparsity([one._replace(valid_T=None) for one in together]) != pytest.approx(
        routing_sparsity(apart), abs=1e-3
    )


def test_scores_keep_every_row_beside_what_is_valid() -> None:
    model, batch = make("llama"), padded("left")
    (first, second) = record(model, batch)
    for one in (first, second):
        assert one.scores_TE.shape[:2] == one.mask_TE.shape[:2] == (2, LONG)
        assert one.valid_T is not None and torch.equal(one.valid_T, batch["attention_mask"].bool())
        assert one.of_tokens(one.scores_TE).shape == (SHORT + LONG, one.scores_TE.shape[-1])
    assert all(one.valid_T is None for one in record(model, *alone(model)))


def counted(model: PreTrainedModel, *batches: Batch) -> list[NeuronCount]:
    with count_neurons(model) as counts, torch.no_grad():
        for batch in batches:
            model(**batch)
    return counts


RELU = {"llama": {"hidden_act": "relu"}, "mixtral": {"hidden_act": "relu"}}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral", "t5-relu"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_neurons_and_their_zeros_are_counted_as_text_by_text(
    family: str, side: str, sparse: bool
) -> None:
    model = make(family, **RELU.get(family, {}))
    if not sparse:
        model = build(family, **RELU.get(family, {}))
    together = counted(model, inputs_for(model, padded(side)))
    apart = counted(model, *alone(model))
    assert sum(count.tokens for count in apart) == 2 * (SHORT + LONG) * (
        2 if model.config.is_encoder_decoder or family == "mixtral" else 1
    )
    assert together == apart
    assert sum(count.zeros or 0 for count in apart) > 0
    assert two_levels(together) == two_levels(apart)


@every_padding
def test_flops_are_counted_as_text_by_text(family: str, side: str) -> None:
    model = make(family)

    @torch.no_grad()
    def others(*batches: Batch) -> float:
        with count_flops(model) as counter:
            for batch in batches:
                model(**batch)
        return counter.others

    assert others(inputs_for(model, padded(side))) == others(*alone(model))


def test_what_a_decoder_gets_from_its_encoder_is_counted_by_the_encoders_mask() -> None:
    """Three texts for the encoder, padded; the decoder has one token each and no mask."""
    model = build("t5-gated")
    ids_BT = torch.randint(3, 64, (2, LONG))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, SHORT:] = 0
    first = torch.zeros(2, 1, dtype=torch.long)

    @torch.no_grad()
    def others(batch: Batch) -> float:
        with count_flops(model) as counter:
            model(**batch)
        return counter.others

    found = others({"input_ids": ids_BT, "attention_mask": mask_BT, "decoder_input_ids": first})
    each = [
        others({"input_ids": ids_BT[i : i + 1, :length], "decoder_input_ids": first[:1]})
        for i, length in enumerate((SHORT, LONG))
    ]
    assert found == sum(each)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_predictions_are_counted_as_text_by_text(family: str, side: str) -> None:
    model = build(family, **RELU.get(family, {}))
    conversion = Conversion("donor", 1, "sign", {"kind": "threshold", "tau": 0.5})
    attach_experts(model, conversion)

    @torch.no_grad()
    def predictions(*batches: Batch) -> Any:
        with count_predictions(model) as counts:
            for batch in batches:
                model(**batch)
        return counts

    together = predictions(inputs_for(model, padded(side)))
    assert together == predictions(*alone(model))
    assert sum(one.seen for one in together.values()) > 0


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_what_is_left_out_is_counted_as_text_by_text(sparse: bool) -> None:
    model = make("mixtral") if sparse else build("mixtral")
    with count_neurons(model) as counts:
        cuts = {count.name: 0.05 for count in counts}

    @torch.no_grad()
    def left_out(*batches: Batch) -> tuple[int, int]:
        with truncated(model, cuts) as count:
            for batch in batches:
                model(**batch)
        return count.seen, count.left_out

    together = left_out(padded("left"))
    assert together == left_out(*alone(model)) and 0 < together[1] < together[0]


NEW = 4
ASKED = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def generated(model: PreTrainedModel, *batches: Batch, **options: Any) -> list[NeuronCount]:
    host: Any = model
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 0
    with count_neurons(model) as counts:
        for batch in batches:
            host.generate(**batch, **ASKED, **options)
    return counts


def prompts() -> tuple[Batch, list[Batch]]:
    """Two prompts as one batch, and one by one."""
    batch = padded("left")
    del batch["position_ids"]
    ones = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts()]
    return batch, ones


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_cache": True}),
        ("llama", {"use_cache": False}),
        ("llama", {"cache_implementation": "static"}),
        ("gemma3", {"cache_implementation": "static"}),
        ("opt", {"use_cache": True}),
        ("mixtral", {"use_cache": True}),
        ("t5-gated", {"use_cache": True}),
    ],
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
def test_generate_counts_a_batch_of_prompts_as_prompt_by_prompt(
    family: str, options: dict[str, Any], sparse: bool
) -> None:
    model = make(family) if sparse else build(family)
    batch, ones = prompts()
    together, apart = generated(model, batch, **options), generated(model, *ones, **options)
    first = apart[0].tokens if family != "mixtral" else sum(c.tokens for c in apart[:4]) // 2
    if family == "t5-gated":
        assert first == SHORT + LONG  # the encoder's
    elif options.get("use_cache", True):
        assert first == SHORT + LONG + 2 * (NEW - 1)
    assert [count.tokens for count in together] == [count.tokens for count in apart]
    assert [count.on for count in together] == [count.on for count in apart]
    assert sparsity(together) == sparsity(apart)


def test_a_static_cache_changes_no_count() -> None:
    """Its mask comes from `generate` in another form."""
    model, (batch, _) = make("llama"), prompts()
    assert generated(model, batch) == generated(model, batch, cache_implementation="static")


ASK: list[Callable[[PreTrainedModel, Tensor, Tensor], Any]] = [
    lambda model, ids, mask: model(ids, mask),
    lambda model, ids, mask: model(input_ids=ids, attention_mask=mask.bool()),
    lambda model, ids, mask: model(input_ids=ids, attention_mask=mask.float()),
    lambda model, ids, mask: model.model(ids, attention_mask=mask),
    lambda model, ids, mask: model(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask
    ),
    lambda model, ids, mask: model(input_ids=ids, attention_mask=square(mask.bool())),
    lambda model, ids, mask: model(input_ids=ids, attention_mask=added(square(mask.bool()))),
]


def square(valid_BT: Tensor) -> Tensor:
    """A causal mask of every token and all it may see, B x 1 x T x T."""
    length = valid_BT.shape[1]
    return (valid_BT[:, None, None] & torch.ones(length, length).tril().bool()).contiguous()


def added(seen: Tensor) -> Tensor:
    """What is added to the scores."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_mask_is_seen_in_every_form(ask: Callable[..., Any], side: str) -> None:
    model, batch = make("llama"), padded(side)
    with record_routing(model) as records:
        ask(model, batch["input_ids"], batch["attention_mask"])
    assert [one.tokens for one in records] == [SHORT + LONG] * 2


def test_a_mask_that_says_nothing_of_the_tokens_is_left_alone() -> None:
    model = make("llama")
    ids_BT = padded("left")["input_ids"]
    with valid_tokens(model) as tokens, record_routing(model) as records, torch.no_grad():
        model(input_ids=ids_BT, attention_mask=torch.ones(2, 1, 1, LONG).bool())
        assert tokens.of_ids(ids_BT) is None
    assert [one.tokens for one in records] == [2 * LONG] * 2


@torch.no_grad()
def test_a_pass_inside_another_has_its_own_mask_and_gives_it_back() -> None:
    model, batch = make("llama"), padded("left")
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    seen: list[Any] = []

    def look(*_: Any) -> None:
        seen.append(tokens.of_ids(ids_BT))

    with valid_tokens(model) as tokens:
        model.model.norm.register_forward_hook(look)
        model.lm_head.register_forward_hook(look)
        model(input_ids=ids_BT, attention_mask=mask_BT)
        look()
    assert torch.equal(seen[0], mask_BT.bool()) and torch.equal(seen[1], mask_BT.bool())
    assert seen[2] is None


class Operators(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "t5-gated", "mixtral"])
def test_a_training_batch_has_no_mask_and_costs_nothing_more(family: str) -> None:
    """No operator runs for it, so no device is waited for."""
    model = make(family).train()
    batch = alone(model)[1]
    with Operators() as plain:
        model(**batch)
    with record_routing(model) as records, Operators() as recorded:
        model(**batch)
    assert recorded.names == plain.names
    assert records and all(one.valid_T is None for one in records)


def test_no_hook_stays_behind_after_an_exception() -> None:
    model = make("mixtral")

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = model.lm_head.register_forward_hook(fail)
    with valid_tokens(model) as tokens:
        with pytest.raises(ArithmeticError):
            model(**padded("left"))
        assert tokens.of_ids(padded("left")["input_ids"]) is None
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(ffn.observers for ffn in expert_ffns(model))


def test_a_module_that_is_no_model_has_no_mask() -> None:
    with valid_tokens(nn.Linear(2, 2)) as tokens:
        assert tokens.count(torch.zeros(3, 4, 2)) == 12


def test_a_conversion_in_soft_mode_counts_padding_neither() -> None:
    model, _ = routed(build("llama"), replace(THRESHOLD, mode="soft"))
    randomize(model)
    assert totals(record(model, padded("left"))) == totals(record(model, *alone(model)))
