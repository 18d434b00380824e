"""Bytes that are reported, against a kernel in plain Python that keeps a book of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import (
    Conversion,
    attach_experts,
    read_block,
    write_conversion,
)
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.routers import ROUTERS
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import FFN, find_ffns, unfused_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.kernels.weights import FFNWeights
from moe_tools.measure.evaluate import evaluate, tally
from moe_tools.measure.inputs import count_inputs
from moe_tools.steps.quantize import quantize
from moe_tools.thresholds.calibration import Plan, thresholded
from tests.families import UNEVEN, build, randomize, routed
from tests.measure.test_inputs import converted, seen_of

WIDTH, BATCH, LENGTH = 32, 3, 7
"""21 tokens in a pass: with 16 in a group, 5 of them are in none."""
TEXT_BT = torch.randint(5, 64, (2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
WIDE: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": WIDTH}}
"""What a family calls its width, where that is not hidden_size."""
Key = tuple[Any, ...]
"""Names something in memory; what has one name is read once."""
Book = dict[Key, float]
"""What was read -> its bits."""


def wide(family: str) -> PreTrainedModel:
    """So wide that a group of 32 numbers, which share a scale, is full."""
    return build(family, **WIDE.get(family, {"hidden_size": WIDTH}))


# --- the kernel


@dataclass
class Memory:
    """The weights of one FFN, which notes what is read of them."""

    name: str
    weights: FFNWeights
    bits: int
    """Of a number: 16, or codes beside a bf16 scale for each 32."""
    book: Book = field(default_factory=dict)

    def row(self, kind: str, neuron: int) -> Tensor:
        """One row of gate, up or down."""
        rows_FD = getattr(self.weights, f"{kind}_FD")
        scales = 0 if self.bits == 16 else 16 * (WIDTH // 32)
        bits = self.bits * rows_FD.shape[1] + scales
        # of a row whose high bits, and scales, were read before, the low bits are left
        self.note((kind, neuron), bits - self.book.get((self.name, kind, neuron, "high"), 0))
        return rows_FD[neuron]

    def note(self, key: Key, bits: float) -> None:
        self.book[(self.name, *key)] = bits

    def inputs(self) -> list[str]:
        """Rows that a hidden activation is made of."""
        return ["up"] if self.weights.gate_FD is None else ["gate", "up"]


def own(memory: Memory, router: Any) -> None:
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        memory.note(("router", name), 16 * tensor.numel())


def signs(memory: Memory, router: Any) -> None:
    for neuron in range(memory.weights.neurons):
        memory.note(("signs", neuron), 32 * -(-WIDTH // 32))


def int8(memory: Memory, router: Any) -> None:
    for neuron in range(memory.weights.neurons):
        memory.note(("int8", neuron), 8 * WIDTH + 16 + 16)  # a scale and an L1 norm


def every_input(memory: Memory, router: Any) -> None:
    for neuron in range(memory.weights.neurons):
        for kind in memory.inputs():
            memory.row(kind, neuron)


def some_inputs(memory: Memory, router: Any) -> None:
    for neuron in router.neurons.tolist():
        for kind in memory.inputs():
            memory.row(kind, neuron)


def gates(memory: Memory, router: Any) -> None:
    for neuron in range(memory.weights.neurons):
        memory.row(memory.inputs()[0], neuron)


def copies(memory: Memory, router: Any) -> None:
    """Rows in few bits and their scales, and a norm a neuron; of stored rows, the high bits."""
    for neuron in range(memory.weights.neurons):
        memory.note(("norm", neuron), 16)
        for kind in memory.inputs():
            bits = router.bits * WIDTH + 16 * (WIDTH // 32)
            if router.of is None:
                memory.note(("copy", kind, neuron), bits)
            else:
                memory.note((kind, neuron, "high"), bits)


SCORING: dict[str, Callable[[Memory, Any], None]] = {
    "sigmoid": own,
    "mlp": own,
    "norm": own,
    "sign": signs,
    "int8_gate": int8,
    "oracle": every_input,
    "representative": some_inputs,
    "cats": gates,
    "few_bits": copies,
}
"""Router -> what it reads to score a token."""


def neuron_by_neuron(memory: Memory, x_D: Tensor, on: list[bool]) -> Tensor:
    """y_D, from the rows of the neurons that are on alone."""
    weights = memory.weights
    act: Any = weights.act
    y_D = torch.zeros(WIDTH) if weights.down_D is None else weights.down_D.clone()
    for neuron in (index for index, runs in enumerate(on) if runs):
        sums = [memory.row(kind, neuron) @ x_D for kind in memory.inputs()]
        biases = (weights.gate_F, weights.up_F)[-len(sums) :]
        sums = [s if b is None else s + b[neuron] for s, b in zip(sums, biases, strict=True)]
        h = act(sums[0]) * (sums[1] if len(sums) == 2 else 1)
        y_D += h * memory.row("down", neuron)
    return y_D


# --- what the model does


@dataclass
class Call:
    """One FFN on the tokens of a pass that came to it."""

    ffn: ExpertFFN | FFN
    tokens: list[int]
    x_TD: Tensor
    y_TD: Tensor


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[list[Call]]]:
    """The calls of every pass."""
    passes: list[list[Call]] = []
    chosen: dict[str, Tensor] = {}
    ffns: list[Any] = expert_ffns(model) or unfused_ffns(model)

    def see(ffn: Any) -> Callable[..., None]:
        host, _, index = ffn.name.rpartition(".")

        def keep(_: nn.Module, args: Any, output: Tensor) -> None:
            x_TD, tokens = args[0].flatten(0, -2), list(range(BATCH * LENGTH))
            if host in chosen:
                places_KT = chosen[host].T.tolist()
                tokens = [t for row in places_KT for t, e in enumerate(row) if e == int(index)]
            passes[-1].append(Call(ffn, tokens, x_TD, output.flatten(0, -2)))

        return keep

    def choose(name: str) -> Callable[..., None]:
        return lambda module, args: chosen.update({name: module.chosen_TK(args)})

    handles = [model.register_forward_pre_hook(lambda *_: passes.append([]))]
    for name, module in model.named_modules():
        if isinstance(module, HostExperts):
            handles.append(module.register_forward_pre_hook(choose(name)))
    for ffn in ffns:
        module = ffn if isinstance(ffn, ExpertFFN) else ffn.layer
        handles.append(module.register_forward_hook(see(ffn)))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def books(passes: list[list[Call]], bits: int) -> list[list[Book]]:
    """For each pass and each token what it reads, once the outputs were found to be right."""
    found = [[Book() for _ in range(BATCH * LENGTH)] for _ in passes]
    for calls, tokens in zip(passes, found, strict=True):
        for call in calls:
            ffn, weights = call.ffn, call.ffn.weights()
            on_TF = masks(ffn, call.x_TD)
            rows = zip(call.tokens, call.x_TD, on_TF, call.y_TD, strict=True)
            for token, x_D, on, y_D in rows:
                memory = Memory(ffn.name, weights, bits, tokens[token])
                if isinstance(ffn, ExpertFFN):
                    SCORING[kind_of(ffn)](memory, ffn.router)
                ours_D = neuron_by_neuron(memory, x_D, on) + constants(memory, ffn, on)
                torch.testing.assert_close(ours_D, y_D, rtol=1e-4, atol=1e-5)
    return found


def constants(memory: Memory, ffn: ExpertFFN | FFN, on: list[bool]) -> Tensor:
    """What a refit adds: a bias, and the sum of all experts' constants less those that are on."""
    if not isinstance(ffn, ExpertFFN) or ffn.bias_D is None or ffn.off_RD is None:
        return torch.zeros(WIDTH)
    y_D, first = ffn.bias_D + ffn.off_RD.sum(0), 0
    for expert, size in enumerate(ffn.division.sizes):
        if expert >= ffn.shared and on[first]:
            memory.note(("constant", expert), 16 * WIDTH)
            y_D = y_D - ffn.off_RD[expert - ffn.shared]
        first += size
    return y_D


def masks(ffn: ExpertFFN | FFN, x_TD: Tensor) -> list[list[bool]]:
    """Which neurons run for each token."""
    if not isinstance(ffn, ExpertFFN):
        return [[True] * ffn.neurons] * len(x_TD)
    return ffn.division.spread_TF(ffn.route(x_TD).mask_TE).tolist()


def kind_of(ffn: ExpertFFN) -> str:
    return next(kind for kind in SCORING if type(ffn.router) is ROUTERS[kind])


def read(found: list[list[Book]], size: int) -> float:
    """Bytes of a pass of so many tokens, the mean over groups of tokens that are far apart."""
    total, groups = 0.0, 0
    for tokens in found:
        count = len(tokens) // size
        for start in range(count):
            together = Book()
            for place in range(size):
                together |= tokens[start + place * count]
            total += sum(together.values())
        groups += count
    return total / 8 / groups


def with_router(
    donor: PreTrainedModel,
    kind: str,
    size: int,
    shared: int,
    bits: int | None,
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    conversion = Conversion(
        "donor",
        size,
        kind,
        {"kind": "topk", "share": 0.4},
        shared_experts=shared,
        router_options=options or {},
        weight_bits=bits,
    )
    for ffn in attach_experts(donor, conversion):
        for parameter in ffn.router.parameters():
            nn.init.normal_(parameter)
    return donor


@torch.no_grad()
def check(model: PreTrainedModel, bits: int | None) -> None:
    """Reported is what was read, to the byte."""
    with watched(model) as passes:
        seen = evaluate(model, TEXT_BT, batch_size=BATCH)
    assert len(passes) == 2
    found = books(passes, bits or 16)
    assert list(seen.traffic) == [1, 4, 16]
    for size, traffic in seen.traffic.items():
        assert traffic.tokens == size
        whole = read(found, size)
        assert traffic.ffn + traffic.scoring == pytest.approx(whole, rel=1e-12)
        assert traffic.total == pytest.approx(whole + traffic.rest, rel=1e-12)
        assert traffic.per_token == pytest.approx(traffic.total / size)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", SCORING)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bytes_are_what_a_kernel_reads(family: str, kind: str, bits: int | None) -> None:
    size = 1 if kind in ("sign", "int8_gate", "few_bits", "cats") else UNEVEN
    check(with_router(wide(family), kind, size, 0, bits), bits)


@pytest.mark.parametrize(("bits", "of"), [(2, None), (8, None), (4, 8), (2, 8), (2, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_high_bits_of_stored_weights_are_read_once(family: str, bits: int, of: int | None) -> None:
    model = wide(family)
    if of is not None:
        quantize(model, of, TEXT_BT[:0])  # type: ignore[arg-type]
    options = {"bits": bits, "of": of}
    check(with_router(model, "few_bits", 1, 0, of, options), of)


@pytest.mark.parametrize("kind", ["sigmoid", "sign", "representative", "oracle", "few_bits"])
@pytest.mark.parametrize("size", [1, UNEVEN])
def test_shared_experts_are_read_for_every_token(kind: str, size: int) -> None:
    check(with_router(wide("llama"), kind, size, 2, None), None)


@pytest.mark.parametrize("kind", ["sigmoid", "int8_gate", "representative"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("bits", [None, 4])
def test_an_moe_host_reads_the_experts_that_it_chose(
    family: str, kind: str, bits: int | None
) -> None:
    check(with_router(wide(family), kind, 8, 1, bits), bits)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_a_dense_model_reads_every_neuron(family: str, bits: int | None) -> None:
    model = wide(family)
    if bits:
        write_conversion(model, Conversion("donor", weight_bits=bits))
    check(model, bits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_constants_of_experts_are_read_where_these_are_on(family: str) -> None:
    model = with_router(wide(family), "sigmoid", UNEVEN, 1, None)
    before = evaluate(model, TEXT_BT)
    for ffn in expert_ffns(model):
        ffn.add_constants()
        assert ffn.bias_D is not None and ffn.off_RD is not None
        ffn.bias_D.normal_(), ffn.off_RD.normal_()
    check(model, None)
    after = evaluate(model, TEXT_BT)
    assert after.traffic[1].ffn > before.traffic[1].ffn
    assert after.flops.ffn > before.flops.ffn


def test_a_threshold_lets_tokens_differ() -> None:
    """Some tokens run no expert, others most: the router is read all the same."""
    model, _ = routed(wide("llama"))
    randomize(model)
    check(model, None)


# --- the rest, and what is derived


def llama_by_hand(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers in FFNs, and in attention and the head."""
    return 2 * 3 * 16 * 48, 2 * 4 * 16 * 16 + 16 * 64


def test_a_llama_by_hand() -> None:
    model, blocks = build("llama"), TEXT_BT
    ffn, rest = llama_by_hand(model)
    seen = evaluate(model, blocks)
    for size in (1, 4, 16):
        traffic = seen.traffic[size]
        assert (traffic.ffn, traffic.ffn_dense) == (2 * ffn, 2 * ffn)
        assert (traffic.scoring, traffic.rest) == (0, 2 * rest)
        assert traffic.total == traffic.total_dense == 2 * (ffn + rest)
        assert traffic.ffn_share == 1
        assert traffic.per_token == 2 * (ffn + rest) / size


@pytest.mark.parametrize(("bits", "share"), [(8, 8.5 / 16), (4, 4.5 / 16)])
def test_a_grid_of_few_bits_makes_the_ffns_alone_cheaper(bits: int, share: float) -> None:
    model = build("llama")
    plain = evaluate(model, TEXT_BT).traffic[1]
    write_conversion(model, Conversion("donor", weight_bits=bits))
    seen = evaluate(model, TEXT_BT).traffic[1]
    assert seen.ffn_share == pytest.approx(share)
    assert (seen.rest, seen.ffn_dense) == (plain.rest, plain.ffn_dense)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_an_moe_host_is_dense_at_what_it_chose(family: str) -> None:
    """Four experts, two of them chosen: four sequences share some, and read all in the end."""
    seen = evaluate(build(family), TEXT_BT).traffic
    assert all(traffic.ffn_share == 1 for traffic in seen.values())
    dense = [seen[size].ffn_dense for size in (1, 4, 16)]
    every = 2 * sum(ffn.projections.numbers for ffn in find_ffns(build(family)))
    assert dense[0] < dense[1] <= dense[2] <= every


def test_a_text_of_few_tokens_knows_no_large_groups() -> None:
    assert list(evaluate(build("llama"), TEXT_BT[:4, :3], batch_size=2).traffic) == [1, 4]
    assert list(evaluate(build("llama"), TEXT_BT[:1, :3]).traffic) == [1]


@pytest.mark.parametrize("family", ["t5-gated", "bert"])
def test_other_models_have_bytes_too(family: str) -> None:
    model = build(family)
    seen = evaluate(model, TEXT_BT, mask_token=4).traffic[1]
    matrices = sum(2 * ffn.projections.numbers for ffn in find_ffns(model))
    assert seen.ffn == seen.ffn_dense == matrices
    assert seen.rest > 0


def test_batches_of_any_size_read_the_same_at_one_token() -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    one, all_at_once = (evaluate(model, TEXT_BT, batch_size=size).traffic[1] for size in (1, 8))
    assert one == all_at_once


def test_padding_is_read_by_nobody() -> None:
    """Groups are made of tokens: those of a padded batch are those of the text."""
    model, _ = routed(wide("mixtral"))
    randomize(model)
    ids_BT = TEXT_BT[:3, :6]
    mask_BT = torch.ones(3, 9, dtype=torch.long)
    mask_BT[:, :3] = 0
    padded_BT = nn.functional.pad(ids_BT, (3, 0), value=9)
    place_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    found = []
    for batch in (
        {"input_ids": ids_BT},
        {"input_ids": padded_BT, "attention_mask": mask_BT, "position_ids": place_BT},
    ):
        with tally(model) as counted, torch.no_grad():
            model(**batch)
        found.append(counted.evaluation(1.0, 1, 18, 6).traffic)
    assert found[0] == found[1]
    assert list(found[0]) == [1, 4, 16]


def test_every_neuron_on_is_never_cheaper_than_dense() -> None:
    model, _ = routed(build("llama"))
    seen = evaluate(model, TEXT_BT).traffic
    for traffic in seen.values():
        assert traffic.ffn == traffic.ffn_dense
        assert traffic.scoring == 2 * 2 * 6 * (16 + 1)  # two layers of six experts, a bias each
    assert replace(seen[1], tokens=4).total == seen[4].total


# --- thresholds


def kept(rows_TD: Tensor, size: int) -> Tensor:
    """Numbers that one of a group of tokens keeps, for each group of the text's one pass."""
    groups = len(rows_TD) // size
    return (rows_TD[: groups * size] != 0).view(size, groups, -1).any(0)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_columns_of_dropped_inputs_go_unread(family: str, sparse: bool, bits: int | None) -> None:
    """A group reads the columns that one of its tokens keeps; of chosen neurons, rows are whole."""
    model = converted(family, routed=sparse)
    block = read_block(model.config)
    assert block is not None
    write_conversion(model, replace(block, weight_bits=bits))
    seen, numbers = evaluate(model, TEXT_BT, batch_size=len(TEXT_BT)), seen_of(model, TEXT_BT)
    on: dict[str, Tensor] = {}
    if sparse:
        with record_routing(model) as records, torch.no_grad():
            model(input_ids=TEXT_BT)
        on = {one.ffn: one.division.spread_TF(one.mask_TE).flatten(0, -2) for one in records}
    assert list(seen.traffic) == ([1] if sparse else [1, 4, 16])
    for size in seen.traffic:
        read = computed = 0.0
        for name in dict.fromkeys(site.rpartition(":")[0] for site in numbers):
            h_TF, x_TD = numbers[f"{name}:hidden"], numbers[f"{name}:input"]
            runs_GF = kept(on.get(name, torch.ones_like(h_TF)), size)
            x_GD, h_GF = kept(x_TD, size), kept(h_TF, size)
            matrices = 1 if family == "gpt2" else 2
            second = 16 * float(h_GF.sum(1).float().mean())
            first_G = matrices * runs_GF.sum(1).float()
            computed += float((first_G * x_GD.sum(1)).mean()) + second
            read += float((first_G * (16 if sparse else x_GD.sum(1))).mean()) + second
        found = seen.traffic[size].ffn
        assert found == pytest.approx(read * (16 if bits is None else 8.5) / 8, rel=1e-5)
        if size == 1:
            assert seen.flops.ffn == pytest.approx(2 * computed, rel=1e-5)


def test_attention_may_read_less_too() -> None:
    plain = evaluate(build("llama"), TEXT_BT)
    model = converted("llama", routed=False, where="all")
    seen = evaluate(model, TEXT_BT)
    attention = 2 * 2 * 4 * 16 * 16
    saved = []
    for size in (1, 4, 16):
        one, other = plain.traffic[size], seen.traffic[size]
        assert (other.rest, other.total_dense) == (one.rest, one.total_dense)
        assert other.total == pytest.approx(other.ffn + other.rest - other.spared)
        saved.append(other.spared)
    assert attention > saved[0] > saved[1] >= saved[2] >= 0
    assert saved[0] == pytest.approx(0.4 * attention, rel=0.2)
    assert seen.flops.spared == pytest.approx(saved[0])  # two FLOPs and two bytes a weight


def test_thresholds_inside_experts_have_figures_for_one_token_alone() -> None:
    seen = evaluate(converted("mixtral", routed=False), TEXT_BT)
    assert list(seen.traffic) == [1]
    assert seen.traffic[1].ffn_share == pytest.approx(0.6, abs=0.1)


def test_a_folder_with_thresholds_is_charged_for_what_it_reads() -> None:
    """By the count of its inputs, which has a naive twin of its own (test_inputs)."""
    model = build("llama")
    blocks_BT = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    dense = evaluate(model, blocks_BT)
    plan = Plan(0.5, where="all")
    with thresholded(model, plan, blocks_BT), count_inputs(model) as counts:
        seen = evaluate(model, blocks_BT)
    tokens = blocks_BT.numel()
    whole = sum(count.reads_per_input * count.width * count.tokens for count in counts)
    assert 0.4 < 1 - sum(count.read for count in counts) / whole < 0.6
    saved = (dense.flops.total - seen.flops.total) / 2
    assert saved == pytest.approx(sum(c.read_without - c.read for c in counts) / tokens)
    assert dense.traffic[1].total - seen.traffic[1].total == pytest.approx(2 * saved)
    assert seen.flops.total_dense == dense.flops.total == seen.flops.total + 2 * saved
    assert seen.ffn_sparsity == pytest.approx(1 - seen.flops.ffn / dense.flops.ffn)
