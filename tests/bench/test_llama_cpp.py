"""llama.cpp beside our models: how it is found and run, and that it computes the same model."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from moe_tools.bench.generate import Rival, bench_generate, shape_models
from moe_tools.bench.llama_cpp import (
    GreedyLlama,
    file_token_bytes,
    find_llama_cpp,
    llama_cpp_rivals,
)
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.export.gguf import plan
from moe_tools.export.gguf_file import write_gguf
from tests.export.test_gguf import llama, rounded
from tests.families import build

IDS_BT = torch.arange(5)[None]
HERE = find_spec("llama_cpp") is not None
needs_package = pytest.mark.skipif(not HERE, reason="llama-cpp-python is not installed")


def program(folder: Path, *, depth: bool = True, says: str = "", code: int = 0) -> Path:
    """A stand-in for llama-bench: notes its options, and takes 2 s for a prompt, 1 s else."""
    path = folder / "llama-bench"
    path.write_text(
        f"""#!{sys.executable}
import json, sys
from pathlib import Path
if sys.argv[1] == "--help":
    print("-p, -n" + (", -d, --n-depth" if {depth} else ""))
    sys.exit()
with Path(r"{folder}", "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
assert Path(sys.argv[2]).read_bytes()[:4] == b"GGUF"
print("loading", file=sys.stderr)
prefill = sys.argv[sys.argv.index("-n") + 1] == "0"
print({says!r} or json.dumps([{{"avg_ns": 2e9 if prefill else 1e9}}]))
sys.exit({code})
"""
    )
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("depth", [True, False], ids=["depth", "no depth"])
def test_the_program_runs_once_for_each_phase(depth: bool, tmp_path: Path) -> None:
    engine = find_llama_cpp(str(program(tmp_path, depth=depth)))
    with llama_cpp_rivals(llama(), engine, context=9, threads=3) as rivals:
        names = ["llama.cpp f16", "llama.cpp q8_0", "llama.cpp q4_0"]
        assert [rival.name for rival in rivals] == names
        sizes = [rival.token_bytes for rival in rivals]
        assert sizes[1] / sizes[0] == 8.5 / 16 and sizes[2] / sizes[0] == 4.5 / 16
        assert rivals[0].seconds(IDS_BT, 3) == (2.0, 1.0)
    prefill, decode = calls(tmp_path)
    file = Path(prefill[1])
    assert file.name == "dense-f16.gguf" and not file.exists()
    common = ["-m", str(file), "-r", "1", "-t", "3", "-ngl", "0", "-o", "json"]
    assert prefill == [*common, "-p", "5", "-n", "0"]
    assert decode == [*common, "-p", "0", "-n", "3", *(["-d", "5"] if depth else [])]


@pytest.mark.parametrize(
    ("says", "code", "message"),
    [
        ("a\nb\nc\nd", 1, r"llama-bench ended with code 1: b / c / d$"),
        ("no json\n", 0, "did not print one test as JSON, but: no json$"),
        ("[]", 0, r"did not print one test as JSON, but: \[\]$"),
        ('[{"avg_ts": 1}]', 0, "did not print one test as JSON"),
        (" ", 0, "did not print one test as JSON, but: nothing$"),
    ],
)
def test_what_the_program_says_wrong_is_one_line(
    says: str, code: int, message: str, tmp_path: Path
) -> None:
    engine = find_llama_cpp(str(program(tmp_path, says=says, code=code)))
    with (
        llama_cpp_rivals(llama(), engine, context=9, threads=1, kinds=["f16"]) as (rival,),
        pytest.raises(ValueError, match=message) as raised,
    ):
        rival.seconds(IDS_BT, 3)
    assert "\n" not in str(raised.value)


def test_a_program_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with llama_cpp_rivals(llama(), find_llama_cpp(), context=9, threads=1) as rivals:
        assert rivals[0].seconds(IDS_BT, 3) == (2.0, 1.0)


def test_where_there_is_none_the_ways_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("moe_tools.bench.llama_cpp.find_spec", lambda _: None)
    words = ["bench", "generate", "--shape", "64x160", "--against", "llama.cpp"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "llama.cpp is not here: give a path to its llama-bench by --llama-bench" in said
    assert "pip install llama-cpp-python" in said
    assert main([*words, "--llama-bench", str(tmp_path / "nothing")]) == 2
    assert "nothing is no program that can be run" in capsys.readouterr().err


def test_a_folder_that_llama_cpp_cannot_run_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("qwen2").config.save_pretrained(tmp_path / "empty")
    words = ["bench", "generate", str(tmp_path / "empty"), "--against", "llama.cpp"]
    assert main([*words, "--llama-bench", str(program(tmp_path))]) == 2
    assert "and this is a qwen2" in capsys.readouterr().err


def test_rivals_are_dense_rows_of_the_same_run() -> None:
    models = shape_models("64x160", 16, torch.float32)
    seen: list[tuple[list[int], int]] = []

    def seconds(ids_BT: torch.Tensor, tokens: int) -> tuple[float, float]:
        seen.append((list(ids_BT.shape), tokens))
        return 1e-9, 1e-9

    rows = bench_generate(
        models, prompt=5, tokens=3, rounds=2, rivals=[Rival("other", 1000.0, seconds)]
    )
    other = rows[-1]
    assert seen == [([1, 5], 3)] * 3  # one round does not count
    assert other.model == "other" and other.dense and other.sparsity == 0
    assert other.decode == pytest.approx(3e9) and other.bytes_per_token == 1000
    assert all(row.bar == "other" and row.over_bar < 1 for row in rows[:-1])
    assert other.over_bar == 1


def test_the_command_adds_three_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(llama(), tmp_path / "out")
    few = ["--prompt-tokens", "4", "--tokens", "2", "--repeats", "1", "--threads", "1"]
    against = ["--against", "llama.cpp", "--llama-bench", str(program(tmp_path))]
    assert main(["bench", "generate", str(tmp_path / "out"), *few, *against, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["generate"]
    f16, q8_0, q4_0 = figures[-3:]
    assert [row["model"] for row in (f16, q8_0, q4_0)] == [
        "llama.cpp f16",
        "llama.cpp q8_0",
        "llama.cpp q4_0",
    ]
    assert f16["prefill"] == 2 and f16["decode"] == 2 and f16["dense"]
    assert f16["bytes_per_token"] == figures[0]["bytes_per_token"] / 2  # the folder is in fp32


def test_options_of_other_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ffn", "--against", "llama.cpp"]) == 2
    assert "--against is of bench generate" in capsys.readouterr().err
    assert main(["bench", "generate", "--llama-bench", "x"]) == 2
    assert "--llama-bench is for --against llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_token_reads_the_head_once_and_no_embedding(tied: bool, tmp_path: Path) -> None:
    model, file = llama(tie_word_embeddings=tied), tmp_path / "out.gguf"
    write_gguf(plan(model.config), model.state_dict(), file)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert file_token_bytes(file) == 2 * sum(linear.weight.numel() for linear in linears)
    assert len(GGUFReader(file).tensors) == len(plan(model.config).tensors)


@needs_package
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llama_cpp_computes_the_model_that_transformers_does(tied: bool, tmp_path: Path) -> None:
    """Rope, grouped queries, norms, head: greedy tokens and logits of 24 tokens, in f16."""
    model = rounded(llama(tie_word_embeddings=tied, rope_theta=500.0, rms_norm_eps=1e-3))
    write_gguf(plan(model.config), model.state_dict(), tmp_path / "out.gguf")
    ids = [(7 * index) % 96 for index in range(17)]
    with closing(GreedyLlama(tmp_path / "out.gguf", 64, 1)) as greedy:
        for _ in range(2):  # a second prompt begins anew
            known, token = list(ids), greedy.prefill(ids)
            for _ in range(24):
                expected_V = model(torch.tensor([known])).logits[0, -1]
                found_V = torch.tensor(greedy.logits_V())
                # x is rounded to f16 there, and so are keys and values
                torch.testing.assert_close(found_V, expected_V, rtol=0.02, atol=0.02)
                assert token == int(expected_V.argmax())
                known.append(token)
                token = greedy.decode(token)


@needs_package
def test_every_kind_runs_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with llama_cpp_rivals(llama(), find_llama_cpp(), context=9, threads=1) as rivals:
        for rival in rivals:
            prefill, decode = rival.seconds(IDS_BT, 3)
            assert prefill > 0 and decode > 0


@needs_package
def test_a_file_that_the_package_cannot_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"llama_cpp cannot load bad.gguf: "):
        GreedyLlama(tmp_path / "bad.gguf", 64, 1)
