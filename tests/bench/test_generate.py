"""Timing whole models: what is compared, and that it is what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.bench.generate import (
    add_quantized,
    bench_generate,
    folder_models,
    shape_models,
    threads,
)
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.inference.packed_linear import PackedLinear
from tests.families import build, logits, randomize, routed

generate_module = importlib.import_module(bench_generate.__module__)


def saved(folder: Path, family: str = "llama") -> PreTrainedModel:
    """A routed model, and its folder."""
    model, _ = routed(build(family))
    randomize(model)
    save(model, folder)
    return model


@torch.no_grad()
def scores(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(3, 12)[None]).logits


def test_a_folder_makes_four_models_of_the_same_weights(tmp_path: Path) -> None:
    model = saved(tmp_path / "out")
    models = folder_models(str(tmp_path / "out"), torch.float32)
    assert list(models) == ["dense", "dense, optimised", "routed", "optimised"]
    for name in ("dense", "dense, optimised"):
        assert expert_ffns(models[name]) == []
    assert any(isinstance(module, PackedLinear) for module in models["dense, optimised"].modules())
    assert all(ffn.packed is None for ffn in expert_ffns(models["routed"]))
    assert all(ffn.packed is not None for ffn in expert_ffns(models["optimised"]))
    for name in ("routed", "optimised"):
        torch.testing.assert_close(logits(models[name]), logits(model), atol=2e-5, rtol=1e-5)
    with every_expert_on(model):
        for name in ("dense", "dense, optimised"):
            torch.testing.assert_close(logits(models[name]), logits(model), atol=2e-5, rtol=1e-5)


def test_a_dense_folder_with_exact_zeros_makes_two(tmp_path: Path) -> None:
    save(build("opt"), tmp_path / "relu")
    models = folder_models(str(tmp_path / "relu"), torch.float32)
    assert list(models) == ["dense", "optimised"]
    dense, fast = bench_generate(models, prompt=5, tokens=3, rounds=1)
    assert dense.sparsity == 0 and 0.2 < fast.sparsity < 0.8
    assert dense.dense and not fast.dense and fast.bar == "dense"
    config = build("opt").config
    ffns = 4 * 2 * 2 * config.hidden_size * config.ffn_dim  # fp32, up and down, two layers
    # up is read for all neurons, down for those that fire
    saved_bytes = dense.bytes_per_token - fast.bytes_per_token
    assert saved_bytes == pytest.approx(ffns / 2 * fast.sparsity)


def test_a_dense_folder_makes_two_dense_models(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "dense")
    models = folder_models(str(tmp_path / "dense"), torch.float32)
    assert list(models) == ["dense", "dense, optimised"]
    rows = bench_generate(models, prompt=5, tokens=3, rounds=1)
    assert all(row.dense and row.sparsity == 0 for row in rows)
    assert {row.bar for row in rows} == {max(rows, key=lambda row: row.decode).model}


def test_a_shape_makes_models_that_run_a_tenth_of_their_experts() -> None:
    models = shape_models("64x160", 16, torch.float32)
    dense, packed, plain, fast = bench_generate(models, prompt=5, tokens=3, rounds=2)
    assert (packed.model, plain.model, fast.model) == ("dense, optimised", "routed", "optimised")
    assert (
        dense.sparsity == packed.sparsity == 0
        and plain.sparsity == fast.sparsity == pytest.approx(0.9)
    )
    assert dense.prefill_speedup == dense.decode_speedup == 1
    assert all(t.prefill > 0 and t.decode > 0 and t.decode_speedup > 0 for t in (plain, fast))
    torch.testing.assert_close(
        scores(models["routed"]), scores(models["optimised"]), atol=2e-5, rtol=1e-5
    )


def test_the_models_share_what_is_not_packed() -> None:
    models = shape_models("64x160", 16, torch.bfloat16)
    places = {m.get_input_embeddings().weight.data_ptr() for m in models.values()}
    assert len(places) == 1


WIDTH, NEURONS, LAYERS, VOCABULARY = 64, 160, 10, 32000
FFNS = LAYERS * 3 * WIDTH * NEURONS
REST = LAYERS * 4 * WIDTH * WIDTH + VOCABULARY * WIDTH
"""Numbers in the FFNs and in the other linears of the random model of 64x160."""


def test_every_row_says_what_a_token_reads_of_it_and_how_fast() -> None:
    models = shape_models("64x160", 16, torch.bfloat16)
    name = add_quantized(models, torch.int8, "int4")
    assert name == "int8, linears int4" and list(models)[-2:] == ["dense, linears int4", name]
    rows = bench_generate(models, prompt=5, tokens=3, rounds=2, packed={name: torch.int8})
    found = {row.model: row.bytes_per_token for row in rows}
    routers = LAYERS * (WIDTH + 1) * 10 * 4  # a row and a bias for each expert, in fp32
    assert found == pytest.approx(
        {
            "dense": 2 * (FFNS + REST),
            "dense, optimised": 2 * (FFNS + REST),
            "routed": 2 * (FFNS + REST) + routers,
            "optimised": 2 * (0.1 * FFNS + REST) + routers,
            "dense, linears int4": 4.5 / 8 * (FFNS + REST),
            name: 8.5 / 8 * 0.1 * FFNS + 4.5 / 8 * REST + routers,
        }
    )
    for row in rows:
        assert row.gigabytes_per_second == pytest.approx(row.decode * row.bytes_per_token / 1e9)
        assert row.share_of_read_rate == pytest.approx(row.gigabytes_per_second / row.read_rate)
    dense = [row for row in rows if row.dense]
    assert [row.model for row in dense] == ["dense", "dense, optimised", "dense, linears int4"]
    bar = max(dense, key=lambda row: row.decode)
    assert {row.bar for row in rows} == {bar.model} and bar.over_bar == 1


def test_copies_in_few_bits_are_read_as_int4(tmp_path: Path) -> None:
    spec = {"kind": "threshold", "tau": 0.0}
    model = build("llama")
    attach_experts(model, Conversion("donor", 1, "few_bits", spec, router_options={"bits": 3}))
    save(model, tmp_path / "out")
    models = folder_models(str(tmp_path / "out"), torch.float32)
    rows = {row.model: row for row in bench_generate(models, prompt=5, tokens=3, rounds=1)}
    width, neurons, layers = 16, 48, 2
    copies = layers * neurons * (2 * width * 4.5 / 8 + 4)  # gate and up, and a norm
    off = rows["optimised"].sparsity * layers * 3 * width * neurons * 4
    more = rows["optimised"].bytes_per_token - rows["dense"].bytes_per_token
    assert more == pytest.approx(copies - off)


def test_more_tokens_than_the_context_has_are_refused() -> None:
    models = shape_models("64x160", 16, torch.float32)
    with pytest.raises(ValueError, match="2000 tokens and 101 new ones exceed the context of 2048"):
        bench_generate(models, prompt=2000, tokens=100)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="BertForMaskedLM continues no text"):
        folder_models(str(tmp_path / "bert"), torch.float32)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1) as used:
        assert used == before + 1 == torch.get_num_threads()
    assert torch.get_num_threads() == before
    with threads(None) as used:
        assert used == before


def test_sequences_go_on_together_and_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(build("llama"), tmp_path / "dense")
    models = folder_models(str(tmp_path / "dense"), torch.float32)
    seen: list[Tensor] = []

    timed = generate_module._seconds

    def seconds(model: PreTrainedModel, ids_BT: Tensor, tokens: int) -> tuple[float, float]:
        timed(model, ids_BT, tokens)
        seen.append(ids_BT)
        return 2.0, 4.0

    monkeypatch.setattr(generate_module, "_seconds", seconds)
    drawn = bench_generate(models, prompt=5, tokens=3, sequences=4, rounds=1)
    given = bench_generate(models, prompt=torch.arange(3, 15).view(2, 6), tokens=3, rounds=1)
    assert {tuple(ids_BT.shape) for ids_BT in seen} == {(4, 5), (2, 6)}
    assert all((row.prefill, row.decode) == (20 / 2, 12 / 4) for row in drawn)
    assert all((row.prefill, row.decode) == (12 / 2, 6 / 4) for row in given)
