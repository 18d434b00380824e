"""`python -m tools.gpu`: every stage interpreted, its page, and what it says where none can run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_tools.bench.cuda import Plan
from moe_tools.cached import cache_file
from moe_tools.inference.card_limits import FILE
from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.config import candidates
from tools.gpu import check, tiles
from tools.gpu.card import Card
from tools.gpu.cases import FEW_BITS, FLOATS, ODD, REAL, ROUTES, TINY, TOKENS, Case, cases
from tools.gpu.context import Context, Skip
from tools.gpu.page import DRY, page
from tools.gpu.stages import STAGES, Result, Stage, run_stage
from tools.gpu.workers import share_out

ROOT = Path(__file__).parents[2]
LETTERS = [stage.letter for stage in STAGES]
H200 = Card("3.6.0", "2.11.0", "NVIDIA H200", (9, 0), memory=140 << 30, free=139 << 30, l2=60 << 20)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # As on a machine with a GPU: nothing says that kernels are interpreted.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.gpu", *arguments]
    environment = kept | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a dry run of all stages, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    done = run("--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dry_run_runs_every_stage(dry: tuple[Path, str]) -> None:
    out, _ = dry
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{letter}.json" for letter in LETTERS),
        "page.md",
    ]
    for stage in STAGES:
        result = Result.load(out, stage)
        assert result.stage == stage.name and result.ended and result.rows, result
        assert not result.failed and not result.skipped and not result.stopped, result
    assert len(Result.load(out, STAGES[0]).rows) == len(cases(True, [])) + 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dry_run_claims_no_time(dry: tuple[Path, str]) -> None:
    out, printed = dry
    text = (out / "page.md").read_text()
    assert text.strip() == printed.strip()
    assert DRY in text
    for stage in STAGES:
        assert f"## {stage.letter}. {stage.title}\n" in text
    assert not re.search(r"\d(\.\d+)? ?(ms|s|GB/s|x)\b", text)
    assert "tokens a second of whole models" in text and "Tokens a second" not in text
    keys = {key for stage in STAGES for row in Result.load(out, stage).rows for key in row}
    assert not keys & {"ms", "gain", "share", "decode", "speedup", "seconds", "peak_bytes"}


# --- what cannot run ------------------------------------------------------------------------------


def test_without_a_card_it_is_one_line(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "gpu"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: no card: torch sees no GPU; run it where one is, or with --dry")
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (Card(None, "2.11.0"), r"^Triton is not installed: pip install 'moe-tools\[gpu\]'$"),
        (replace(H200, name=None), "^no card: torch sees no GPU"),
        (
            replace(H200, name="Tesla T4", capability=(7, 5)),
            r"^Tesla T4 has compute capability 7\.5: the kernels need 8\.0 \(Ampere\) or later$",
        ),
        (replace(H200, trouble="no backend"), r"^Triton 3\.6\.0 cannot drive NVIDIA H200: no back"),
        (
            replace(H200, free=1 << 30),
            r"^NVIDIA H200 has 1\.0 GiB of free memory: the smallest stage needs 2\.0 GiB$",
        ),
    ],
    ids=["triton", "card", "capability", "driver", "memory"],
)
def test_what_cannot_run_is_named(card: Card, message: str) -> None:
    assert card.refusal is not None and re.search(message, card.refusal)
    assert "\n" not in card.refusal


def test_what_can_run_is_not_refused() -> None:
    assert H200.refusal is None and H200.lacks == []
    assert replace(H200, capability=None).refusal is None  # AMD
    assert "NVIDIA H200, compute capability 9.0, 140 GiB, L2 of 60 MiB" in H200.title
    assert replace(H200, bf16=False).lacks == ["bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "no-such.json"), "error: --table no-such.json cannot be read: No such file"),
        (("--table", "README.md"), "error: README.md is no table of limits: "),
        (("--out", "README.md"), "error: --out README.md cannot be written: File exists"),
        (("--only", "everything"), "argument --only: invalid choice: 'everything'"),
        (("--minutes", "0"), "argument --minutes: 0 is no number of minutes above 0"),
    ],
    ids=["no table", "other file", "out", "stage", "minutes"],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run("--dry-run", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr.strip().splitlines()[-1]


# --- stages, and what becomes of those that fail --------------------------------------------------


def context(tmp_path: Path, seconds: float = 60.0) -> Context:
    return Context("cpu", time.monotonic() + seconds, tmp_path)


class FakeStage:
    """A module with a function `run`."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def run(self, context: Context) -> Iterator[dict[str, Any]]:
        for row in context.within(self.rows):
            if isinstance(row, Exception):
                raise row
            yield row


def staged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *rows: Any) -> Result:
    monkeypatch.setitem(sys.modules, "tools.gpu.speed", FakeStage(*rows))  # type: ignore[arg-type]
    result = run_stage(STAGES[1], context(tmp_path))
    assert Result.load(tmp_path, STAGES[1]) == result
    return result


def test_what_a_stage_raises_stands_in_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = {"shape": "tiny", "tokens": 4, "sparsity": 0.5, "operation": "neurons"}
    result = staged(monkeypatch, tmp_path, fine, RuntimeError("no room\nat all"))
    assert result.error == "RuntimeError: no room" and result.ended and result.failed
    assert result.traceback is not None and "at all" in result.traceback
    assert result.rows == [fine]
    assert "failed: RuntimeError: no room" in page("H200", [result], dry=False)


def test_a_stage_that_cannot_run_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = staged(monkeypatch, tmp_path, Skip("a llama needs 14 GiB, and 8 are free"))
    assert not result.failed and result.ended
    text = page("H200", [result], dry=False)
    assert "## b. one FFN beside cuBLAS" in text
    assert "skipped: a llama needs 14 GiB, and 8 are free" in text


def test_a_wrong_row_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"shape": "tiny", "tokens": 4, "sparsity": 0.5, "operation": "neurons"}
    assert not staged(monkeypatch, tmp_path, row | {"wrong": ""}).failed
    result = staged(monkeypatch, tmp_path, row | {"wrong": "not finite"})
    assert result.failed
    assert "- wrong: tiny, 4, neurons: not finite" in page("H200", [result], dry=False)


def test_at_the_limit_it_says_how_far_it_came(tmp_path: Path) -> None:
    late = context(tmp_path, 60)
    seen = []
    for unit in late.within("abc"):
        seen.append(unit)
        late.deadline = time.monotonic() - 1
    assert seen == ["a"] and late.stopped == "stopped at the limit: 1 of 3 done"
    assert context(tmp_path).stopped is None


@pytest.mark.slow
def test_a_process_that_dies_costs_one_unit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "import os, sys\n"
        "for name in map(str.strip, sys.stdin):\n"
        "    if name == 'b': os.write(2, b'illegal address'); os.abort()\n"
        "    print('{\"case\": \"' + name + '\"}', flush=True)\n"
    )

    def start(dry: bool, errors: Any) -> Any:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        return subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)

    monkeypatch.setattr("tools.gpu.workers._start", start)
    rows = {row["case"]: row for row in share_out("abcd", 2, context(tmp_path))}
    assert sorted(rows) == ["a", "b", "c", "d"]
    assert re.fullmatch(r"its process died with -6: illegal address", rows["b"]["wrong"])
    assert not any("wrong" in rows[name] for name in "acd")


# --- cases ----------------------------------------------------------------------------------------


def test_cases_have_every_variant() -> None:
    found = cases(False, [])
    assert len({case.name for case in found}) == len(found)
    odd = {(c.route, c.gated, c.dtype, c.tokens) for c in found if c.shape == ODD}
    for route, kind in ROUTES.items():
        for gated in (True, False) if kind.up_act == "identity" else (True,):
            for dtype in (*FLOATS, *FEW_BITS):
                assert {(route, gated, dtype, tokens) for tokens in TOKENS} <= odd
    assert {case.shape for case in found} >= {ODD, *REAL}
    assert not any(case.rare for case in found if case.shape in REAL)
    assert [case.rare for case in found] == sorted(case.rare for case in found)
    assert not any("bf16" in (c.dtype, c.x_dtype) for c in cases(False, ["bf16"]))


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("experts", True, "fp32", 3, TINY)
    assert check.check(case, "cpu")["wrong"] == ""
    right = check.Call.y_TD
    monkeypatch.setattr(check.Call, "y_TD", lambda call: right(call) * (1 + 1e-4))
    row = check.check(case, "cpu")
    assert re.search(r"^\w+ is off by 1\.\de-04 of its largest element$", row["wrong"])
    assert row["limit"] == 1e-5 < row["error"]


def test_a_number_that_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, count = check.Call.y_TD, iter(range(9))
    monkeypatch.setattr(check.Call, "y_TD", lambda call: right(call) + 1e-7 * next(count))
    row = check.check(Case("neurons", True, "fp32", 1, TINY), "cpu")
    assert row["wrong"] == "three runs differ"


def test_what_is_not_a_number_is_wrong() -> None:
    error, of = check.worst({"y_TD": torch.tensor([float("nan")])}, {"y_TD": torch.ones(1)})
    assert error == float("inf") and of == "y_TD"


# --- tiles, without a clock -----------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose second tiling is the fastest, and where kernels pay up to 0.4."""

    def seconds(turns: list[list[Any]], repeats: int) -> list[list[float]]:
        if len(turns) > len(candidates(1)):  # dense, and a way for each share
            return [[1.0], *([0.5 if share <= 0.4 else 2.0] for share in tiles.SHARES)]
        return [[2.0, 2.0], [1.0, 1.0], *([[3.0, 3.0]] * (len(turns) - 2))]

    unit = tiles.Unit("tiny", 1, "fp32", "given")
    monkeypatch.setattr(tiles, "UNITS", [unit])
    monkeypatch.setattr(tiles, "graph_seconds", seconds)
    monkeypatch.setattr(tiles, "plan_for", lambda shape, **rest: tiles.TINY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tiles, "Layers", OnTheCpu)


class OnTheCpu(tiles.Layers):
    """Layers of a card that is not there."""

    def __init__(self, plan: Plan, device: str) -> None:
        super().__init__(plan, "cpu")


@pytest.mark.usefixtures("clock")
def test_a_table_is_written_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # At the device "cuda", whose clock is the fixture's.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = Context("cuda", time.monotonic() + 60, tmp_path)
    (row,) = tiles.run(first)
    best = candidates(1)[1]
    assert row["gain"] == 2.0 and row["share"] == 0.4 and not row["wrong"]
    assert row["tiles"] == best.numbers
    (entry,) = limits.read(tmp_path / "tuned.json")
    assert limits.read(cache_file(FILE)) == [entry]  # where `optimize` finds it
    assert entry.device == "Card" and entry.config == best and entry.tokens == 1
    assert (entry.width, entry.neurons) == (tiles.TINY.width, tiles.TINY.neurons)

    monkeypatch.setattr(limits, "in_force", [])
    limits.put_in_force([entry])
    later = Context("cuda", time.monotonic() + 60, tmp_path, table=tmp_path / "tuned.json")
    (row,) = tiles.run(later)
    assert row["tried"] == 1 and row["gain"] == 2.0 and row["tiles"] == best.numbers


# --- the page -------------------------------------------------------------------------------------


def result_of(name: str, *rows: dict[str, Any]) -> Result:
    return Result(name, list(rows), seconds=12.3, ended=True)


def test_the_page_of_a_card_has_the_figures() -> None:
    cell = {"shape": "llama2-7b", "tokens": 1}
    dense = {"operation": "F.linear", "sparsity": 0.0, "ms": 0.08, "speedup": 1.0}
    rate = {"gigabytes_per_second": 3000.0, "share_of_bandwidth": 0.7}
    sparse = {"operation": "experts", "sparsity": 0.9, "ms": 0.0125, "speedup": 6.4}
    decoding = {"host": "llama", "layers": "8 of 32", "model": "dense", "way": "eager"}
    text = page(
        "NVIDIA H200",
        [
            result_of(
                "speed",
                {"shape": "copy", "gigabytes_per_second": 4300.0},
                cell | dense | rate,
                cell | sparse | rate,
                {"shape": "mixtral-8x7b", "tokens": 1, "skipped": "needs 30 GiB, and 8 are free"},
            ),
            result_of("generate", decoding | {"prefill 128": 9000.4, "decode": 120.25}),
            result_of("training", {"step": "soft", "layers": 2, "tokens": 8, "ms": 3.0}),
        ],
        dry=False,
    )
    assert DRY not in text
    assert "## b. one FFN beside cuBLAS (12 s)" in text
    assert "A copy moves 4300 GB/s." in text
    assert "| llama2-7b | 1 | 0.0800 | experts | 6.40x, 0.0125, 3000 GB/s, 70% |" in text
    assert "- skipped: mixtral-8x7b, 1: needs 30 GiB, and 8 are free" in text
    assert "| llama | 8 of 32 | dense | eager | 9000 | 120.2 |" in text
    assert "| soft | 2 | 8 | 3.00 |" in text


def test_files_are_json(tmp_path: Path) -> None:
    made = result_of("correct", {"case": "one", "error": float("inf"), "wrong": "y is off"})
    made.save(tmp_path)
    assert Result.load(tmp_path, STAGES[0]) == made
    assert json.loads((tmp_path / "a.json").read_text())["stage"] == "correct"
    assert Result.load(tmp_path, Stage("z", "none", "", 1.0)) == Result("none", [])


def test_make_gpu_needs_no_environment() -> None:
    made = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "gpu", "PYTHON=python9", "GPU=--minutes 4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.splitlines()[-1] == "python9 -m tools.gpu --minutes 4"
    assert len(made.stdout.splitlines()) == 1


def test_where_no_case_ran_correctness_failed() -> None:
    assert Result("correct", [], ended=True).failed
    assert not Result("correct", [], skipped="too little memory", ended=True).failed
    assert not Result("speed", [], ended=True).failed


@pytest.mark.slow
def test_a_stage_ends_with_its_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu", "--dry-run", "--only", "generate"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment) as process:
        while not (begun := _stages_of(tmp_path)):
            time.sleep(0.1)
        process.terminate()
        assert process.wait() == 128 + 15
    assert begun and not _stages_of(tmp_path)


def _stages_of(out: Path) -> list[int]:
    """Processes that run a stage for this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it ended
            continue
        if b"--stage" in words and str(out).encode() in words:
            found.append(int(path.parent.name))
    return found
