"""FFNs found without names: in every family, in hosts of another build, in modules made for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from moe_tools.hosts.finder.find import Found, find_layouts
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.rows import rows_by_shape
from tests.families import FAMILIES, build, model_inputs

D, F = 16, 24


def tokens() -> Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def noisy(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# Every family of the table.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_says_what_the_shapes_say(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    found = find_layouts(model, model_inputs(model))
    expected = rows_by_shape(model)
    assert not found.refused
    assert {path: _comparable(row) for path, row in found.rows.items()} == {
        path: _comparable(row) for path, row in expected.items()
    }


def _comparable(row: Layout) -> Layout:
    """With the slot that stands for any around up and act."""
    if row.slot:
        assert row.act is not None
        row = replace(row, slot=row.up, bypass=(row.act, row.down))
    return row


# Hosts of another build.

_BODY = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL = {"vocab_size": 64, "n_layer": 2, "n_head": 2}
_GATED = Layout(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj")
_MASKED = replace(_GATED, act=None, slot="down_proj", masked=True)


def in_layer(up: str, act: str, down: str, **more: Any) -> Layout:
    return Layout(up=up, act=act, down=down, slot=up, bypass=(act, down), **more)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Layout]]] = {
    "lfm2": (
        _BODY | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        {"model.layers.0.feed_forward": Layout("w3", "w2", None, "w1", function="silu")},
    ),
    "bart": (
        {
            "vocab_size": 64,
            "d_model": D,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 40,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        {
            path: in_layer("fc1", "activation_fn", "fc2", hidden_dropout="activation_dropout")
            for path in ("model.encoder.layers.0", "model.decoder.layers.0")
        },
    ),
    "prophetnet": (
        {
            "vocab_size": 64,
            "hidden_size": D,
            "encoder_ffn_dim": 48,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
        },
        {
            "prophetnet.encoder.layers.0.feed_forward": Layout(
                "intermediate",
                "output",
                "activation_fn",
                hidden_dropout="activation_dropout",
                output_dropout="dropout",
            )
        },
    ),
    "bloom": (
        _SMALL | {"hidden_size": D},
        {"transformer.h.1.mlp": in_layer("dense_h_to_4h", "gelu_impl", "dense_4h_to_h")},
    ),
    "xlnet": (
        _SMALL | {"d_model": D, "d_inner": 48},
        {
            "transformer.layer.0.ff": in_layer(
                "layer_1", "activation_function", "layer_2", hidden_dropout="dropout"
            )
        },
    ),
    "ctrl": (_SMALL | {"n_embd": D, "dff": 48}, {"transformer.h.0.ffn": Layout("0", "2", "1")}),
    "openai-gpt": (  # its layers share one activation module
        _SMALL | {"n_embd": D},
        {"transformer.h.1.mlp": Layout("c_fc", "c_proj", "act", output_dropout="dropout")},
    ),
    "cpmant": (
        {
            "vocab_size": 64,
            "hidden_size": D,
            "dim_ff": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "dim_head": 8,
            "dropout_p": 0.1,
        },
        {
            "cpmant.encoder.layers.0.ffn.ffn": Layout(
                "w_in.w_1", "w_out", "w_in.act", "w_in.w_0", hidden_dropout="dropout"
            )
        },
    ),
    "modernbert-decoder": (
        {key: value for key, value in _BODY.items() if key != "num_key_value_heads"},
        {"model.layers.0.mlp": Layout("Wi", "Wo", "act", "Wi", hidden_dropout="drop")},
    ),
    "falcon_h1": (
        _BODY
        | {
            "mlp_multipliers": [1.3, 0.7],
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        {"model.layers.0.feed_forward": _MASKED},
    ),
    "gemma3n_text": (
        _BODY
        | {
            "intermediate_size": [48, 48],
            "activation_sparsity_pattern": [0.9, 0.0],
            "layer_types": ["full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
        {"model.layers.0.mlp": _MASKED, "model.layers.1.mlp": _GATED},
    ),
    "deepseek_v4": (_BODY, {"model.layers.0.mlp.shared_experts": _MASKED}),
    "rwkv": (
        {
            "vocab_size": 64,
            "hidden_size": D,
            "attention_hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
        },
        {"rwkv.blocks.0.feed_forward": Layout("key", "value", None, slot="value", masked=True)},
    ),
    "bitnet": (_BODY, {}),
    "mamba": (_BODY, {}),
}
"""Model type -> a tiny configuration, and some of the rows that it has."""


def other_host(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name} yet")
    config = AutoConfig.for_model(name, **OTHERS[name][0])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    inputs = {"input_ids": tokens()}
    if config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": tokens()}
    model = auto.from_config(config)
    model.config.use_cache = False
    return noisy(model), inputs


@pytest.mark.parametrize("name", OTHERS)
def test_hosts_of_another_build(name: str) -> None:
    found = find_layouts(*other_host(name))
    expected = OTHERS[name][1]
    assert {path: found.rows.get(path) for path in expected} == expected
    assert bool(found.rows) == bool(expected)
    assert bool(found.refused) == (name == "bitnet")  # its norm has a weight for each neuron


@pytest.mark.parametrize("name", [name for name, (_, rows) in OTHERS.items() if rows])
def test_another_order_of_the_neurons_changes_no_logit(name: str) -> None:
    model, inputs = other_host(name)
    before = model(**inputs).logits
    for path, row in find_layouts(model, inputs).rows.items():
        permute(model.get_submodule(path), row)
    after = model(**inputs).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@torch.no_grad()
def permute(holder: nn.Module, row: Layout) -> None:
    """Gives the neurons of a row another order, by what it says of gate, up and down."""
    down = holder.get_submodule(row.down)
    columns = down.weight if isinstance(down, nn.Linear) else down.weight.T
    order_F = torch.randperm(columns.shape[1])
    columns.copy_(columns[:, order_F])
    for path in {row.up, row.gate} - {None}:
        linear = holder.get_submodule(path)
        rows = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
        for tensor in (rows, linear.bias):
            if tensor is not None and row.gate == row.up:
                halves = tensor.unflatten(0, (-1, 2) if row.interleaved else (2, -1))
                halves.copy_(halves[order_F] if row.interleaved else halves[:, order_F])
            elif tensor is not None:
                tensor.copy_(tensor[order_F])


# Modules made for it.


class Host(nn.Module):
    """Two layers with a residual stream, around any module from D to D."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, D)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(D), "block": block()}) for _ in range(2)
        )
        self.head = nn.Linear(D, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["block"](layer["norm"](x))
        return self.head(x)


class Block(nn.Module):
    """An FFN with every part that a test can want, and what lies between them."""

    def __init__(self, rows: int = F) -> None:
        super().__init__()
        self.up = nn.Linear(D, rows)
        self.gate = nn.Linear(D, F)
        self.down = nn.Linear(F, D)
        self.act = nn.SiLU()
        self.norm = nn.LayerNorm(F)
        self.scale = nn.Parameter(torch.ones(F))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def block(hidden: Callable[[Any, Tensor], Tensor], rows: int = F) -> Callable[[], nn.Module]:
    return type(
        "Made", (Block,), {"hidden": hidden, "__init__": lambda self: Block.__init__(self, rows)}
    )


def found_in(made: Callable[[], nn.Module]) -> Found:
    torch.manual_seed(0)
    return find_layouts(noisy(Host(made)), {"input_ids": tokens()})


def only_row(made: Callable[[], nn.Module]) -> Layout:
    """The one row of both layers."""
    found = found_in(made)
    assert not found.refused
    assert set(found.rows) == {"layers.0.block", "layers.1.block"}
    (row,) = set(found.rows.values())
    return row


PLAIN = Layout("up", "down", "act")
MASKED = Layout("up", "down", None, slot="down", masked=True)


def glu(m: Any, gate: Tensor, up: Tensor) -> Tensor:
    return m.act(gate) * up


def centred(value: Tensor) -> Tensor:
    return value - value.mean(-1, keepdim=True)


ROWS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, Layout]] = {
    "plain": (lambda m, x: m.act(m.up(x)), F, PLAIN),
    "function": (
        lambda m, x: functional.relu(m.up(x)),
        F,
        replace(PLAIN, act=None, function="relu"),
    ),
    "up before gate": (lambda m, x: m.up(x) * m.act(m.gate(x)), F, replace(PLAIN, gate="gate")),
    "no activation but the product": (
        lambda m, x: m.up(x) * m.gate(x),
        F,
        Layout("gate", "down", None, "up", function="linear"),
    ),
    "fused": (
        lambda m, x: glu(m, *m.up(x).chunk(2, -1)),
        2 * F,
        replace(PLAIN, gate="up"),
    ),
    "fused, up rows first": (
        lambda m, x: glu(m, *reversed(m.up(x).chunk(2, -1))),
        2 * F,
        replace(MASKED, gate="up"),
    ),
    "interleaved": (
        lambda m, x: glu(m, *m.up(x).unflatten(-1, (-1, 2)).unbind(-1)),
        2 * F,
        replace(PLAIN, gate="up", interleaved=True),
    ),
    "interleaved, up rows first": (
        lambda m, x: glu(m, *reversed(m.up(x).unflatten(-1, (-1, 2)).unbind(-1))),
        2 * F,
        replace(MASKED, gate="up", interleaved=True),
    ),
    "a limit": (lambda m, x: m.act(m.up(x).clamp(max=10.0)), F, MASKED),
    "a multiplier, up before gate": (
        lambda m, x: m.up(x) * m.act(1.3 * m.gate(x)),
        F,
        replace(MASKED, gate="gate"),
    ),
    "coupled, all alike": (lambda m, x: m.act(centred(m.up(x))), F, MASKED),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_can_say(name: str) -> None:
    hidden, rows, expected = ROWS[name]
    assert only_row(block(hidden, rows)) == expected


REASONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a norm over the neurons": (lambda m, x: m.norm(m.act(m.up(x))), "neurons are coupled"),
    "a parameter for each": (lambda m, x: m.scale * m.act(m.up(x)), "neurons are not alike"),
    "another input": (
        lambda m, x: m.act(m.up(x)) * m.gate(x.roll(1, -1)),
        "up and gate read different tensors",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_no_row_can_say_has_a_reason(name: str) -> None:
    hidden, reason = REASONS[name]
    found = found_in(block(hidden))
    assert not found.rows
    assert set(found.refused) == {"layers.0.block", "layers.1.block"}
    assert all(reason in said for said in found.refused.values())


class GatedAttention(nn.Module):
    """Causal attention whose output is multiplied by an activated gate, as an FFN's up rows are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True)
        return self.out(mixed * functional.silu(self.gate(x)))


class TokenMixer(nn.Module):
    """Mixes the tokens without weights: only the graph shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.up(x)).cumsum(1))


def low_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))


def without_activation() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F), nn.Dropout(0.1), nn.Linear(F, D))


def low_rank_with_norm() -> nn.Module:
    """The queries of some hosts: a norm bends, but activates nothing."""
    return nn.Sequential(nn.Linear(D, F), nn.LayerNorm(F), nn.Linear(F, D))


def another_width() -> nn.Module:
    """A router of two layers: what it returns is not as wide as the model."""
    router = nn.Sequential(nn.Linear(D, F), nn.SiLU(), nn.Linear(F, 3), nn.Softmax(-1))
    return nn.Sequential(router, nn.Linear(3, D))


@pytest.mark.parametrize(
    "made",
    [GatedAttention, TokenMixer, low_rank, low_rank_with_norm, without_activation, another_width],
)
def test_what_is_no_ffn(made: Callable[[], nn.Module]) -> None:
    assert found_in(made) == Found()


class WithAdapter(nn.Module):
    """An FFN, and a bottleneck of fewer neurons than the model is wide behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
        self.adapter = nn.Sequential(nn.Linear(D, 4), nn.GELU(), nn.Linear(4, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return y + self.adapter(y)


def test_an_adapter_next_to_an_ffn_is_left_out() -> None:
    assert set(found_in(WithAdapter).rows) == {"layers.0.block.ffn", "layers.1.block.ffn"}


class Dropouts(nn.Module):
    """Probabilities as floats and modules, and floats that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, F), nn.Linear(F, D), nn.SiLU()
        self.hidden_p, self.output, self.eps = 0.1, nn.Dropout(0.0), 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x)) * (1.0 if self.eps == 0.5 else 0.0)
        return self.output(self.down(functional.dropout(h, self.hidden_p, self.training)))


def test_dropouts_are_found_and_what_only_makes_zeros_is_none() -> None:
    assert only_row(Dropouts) == replace(PLAIN, hidden_dropout="hidden_p", output_dropout="output")


class Twice(nn.Module):
    """One dropout, behind the activation and behind down, which has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, F), nn.Linear(F, D, bias=False), nn.SiLU()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(self.act(self.up(x)))))


def test_one_dropout_can_be_both() -> None:
    assert only_row(Twice) == replace(PLAIN, hidden_dropout="dropout", output_dropout="dropout")


class CountsOnWidth(nn.Module):
    """Adds its input, and takes h for F wide: the slot of `up` cannot give y."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, F), nn.Linear(F, D), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)) * torch.ones(F))


def test_a_slot_that_does_not_work_is_masked() -> None:
    assert only_row(CountsOnWidth) == MASKED


def test_nothing_is_changed() -> None:
    model, inputs = other_host("prophetnet")
    tensors = copy.deepcopy(model.state_dict())
    modules = {path: (module, module.training) for path, module in model.named_modules()}
    seed = torch.random.get_rng_state()
    find_layouts(model, inputs)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    assert modules == {path: (module, module.training) for path, module in model.named_modules()}
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.prophetnet.encoder.layers[0].feed_forward.activation_dropout == 0.1


def test_a_model_in_train_mode_is_refused() -> None:
    model, inputs = other_host("ctrl")
    with pytest.raises(ValueError, match=r"CTRLLMHeadModel is in train mode: call model\.eval"):
        find_layouts(model.train(), inputs)
