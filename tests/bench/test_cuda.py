"""What `bench kernels --device cuda` would run, as far as it can be seen without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_tools.bench.cuda import BATCHES, OPERATIONS, Plan, ways
from moe_tools.bench.ways import BASELINE, SPARSITIES, KernelTiming, Way
from moe_tools.cli.main import main

LLAMA2 = Plan(4096, 11008, 344, torch.bfloat16, l2=50 << 20)
TINY = Plan(16, 64, 8, torch.float32, l2=0)


def test_a_turn_over_the_layers_reads_more_than_twice_the_l2() -> None:
    assert LLAMA2.size == 3 * 4096 * 11008 * 2
    for variant in LLAMA2.variants:
        read, layers = LLAMA2.expected(*variant), LLAMA2.layers(*variant)
        assert (layers - 1) * read <= 2 * LLAMA2.l2 < layers * read
    assert LLAMA2.layers(1, 0.97, "experts int8") > LLAMA2.layers(1, 0.97, "experts") == 13
    assert LLAMA2.layers(512, 0.97, "neurons") == 1
    assert TINY.layers(1, 0.97, "experts") == 1


def test_the_memory_is_that_of_a_large_gpu() -> None:
    assert 5e9 < LLAMA2.memory < 40e9
    assert replace(LLAMA2, batches=(512,)).memory < 5e9


def test_dense_stands_beside_every_number_of_tokens() -> None:
    variants = LLAMA2.variants
    assert [v for v in variants if v[2] == "F.linear"] == [(t, 0.0, "F.linear") for t in BATCHES]
    for tokens in BATCHES:
        for sparsity in SPARSITIES:
            found = {name for t, off, name in variants if (t, off) == (tokens, sparsity)}
            assert found == set(OPERATIONS)
    each = 1 + len(OPERATIONS) * len(SPARSITIES)
    assert len(set(variants)) == len(variants) == len(BATCHES) * each
    assert LLAMA2.stored("experts int8") == torch.int8
    assert LLAMA2.stored("neurons") == torch.bfloat16


@pytest.fixture(scope="module")
def found() -> list[Way]:
    """Every way at a tiny shape, whose calls the interpreter would run."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    return ways(TINY, "cpu")


def test_bytes_are_those_of_the_union(found: list[Way]) -> None:
    assert [(way.tokens, way.sparsity, way.operation) for way in found] == TINY.variants
    size = {(way.operation, way.tokens, way.sparsity): way.size for way in found}
    assert size["F.linear", 1, 0.0] == TINY.size
    assert size["experts", 1, 0.5] == TINY.size // 2
    assert size["experts int8", 1, 0.5] == TINY.size // 8
    assert size["experts int4", 1, 0.5] == TINY.size * 9 // 128
    assert size["neurons", 1, 0.75] == TINY.size // 4
    for tokens in BATCHES:
        assert size["experts", tokens, 0.9] >= size["experts", 1, 0.9]
        assert TINY.size // 3 <= size["exact gate", tokens, 0.97] <= TINY.size


@pytest.mark.parametrize("operation", [BASELINE, *OPERATIONS])
def test_every_way_runs(found: list[Way], operation: str) -> None:
    way = next(way for way in found if way.operation == operation)
    y_TD = way.calls[0]()
    assert len(way.calls) == 1
    assert y_TD.shape == (1, 16) and bool(y_TD.isfinite().all()) and bool(y_TD.any())


def test_without_a_gpu_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert "bench kernels --device cuda needs a GPU, and torch sees none" in line


def test_the_figures_of_a_gpu_are_drawn_and_say_their_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(*args: object, **options: object) -> list[KernelTiming]:
        dense = KernelTiming("F.linear", "bfloat16", 1, 0.0, 2.0, 1.0, 100.0, 0.5)
        return [dense, KernelTiming("experts int8", "int8", 1, 0.5, 1.0, 2.0, 25.0, 0.125)]

    monkeypatch.setattr("moe_tools.bench.cuda.bench_cuda", timed)
    words = ("--plot", str(tmp_path / "speed.svg"), "--json", "-")
    assert main(["bench", "kernels", "--device", "cuda", *words]) == 0
    assert "experts int8, int8" in (tmp_path / "speed.svg").read_text()
    printed = capsys.readouterr()
    assert [row["dtype"] for row in json.loads(printed.out)["kernels"]] == ["bfloat16", "int8"]
    assert "experts of 8, fp32, cuda" in printed.err
