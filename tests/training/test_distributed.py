"""Two processes on this machine, under every stage of ZeRO: what one process computes, they do."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routers import ROUTERS
from tests.cli.test_convert import WORDS, tokenizer
from tests.families import build, is_router, load_stock
from tests.training.two_processes import DEEPSPEED_WAYS, EXPERT_STEPS, STEPS

ROOT = Path(__file__).parents[2]
WAYS = ("plain", "zero0", "zero1", "zero2", "zero3")

pytestmark = pytest.mark.slow

RECIPE = """
name: two-stages
block_length: 16
steps:
  - split: {expert_size: 8, tokens: 256}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: soft, tokens: 512, target_sparsity: 0.4, lr: 1e-3, checkpoint_every: 2,
            losses: {lm: 1.0, efficiency: 0.1, separability: 0.1}}
  - train: {mode: hard, tokens: 512, target_sparsity: 0.4, lr: 1e-3, checkpoint_every: 2}
"""


def start(
    count: int, *words: str, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """`count` processes of tests/training/two_processes.py, one thread each."""
    script = str(ROOT / "tests" / "training" / "two_processes.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(port)]
    command = [sys.executable, "-m", *torchrun, script] if count > 1 else [sys.executable, script]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [*command, *words], cwd=cwd, env=os.environ | settings, capture_output=True, text=True
    )


def by_one_and_two(factory: pytest.TempPathFactory, task: str) -> Path:
    """one/ and two/: what a task of two_processes.py keeps, done by one process and by two."""
    folder = factory.mktemp(task)
    for name, count in (("one", 1), ("two", 2)):
        done = start(count, task, str(folder / name))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/: every train step by one process and by two, in every way."""
    return by_one_and_two(tmp_path_factory, "stages")


def figures(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "figures.json").read_text())
    found.pop("heldout_perplexity", None)  # that of heldout_lm, with its error in another unit
    return {name: value for name, value in found.items() if isinstance(value, float)}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "trained.safetensors")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", STEPS)
def test_two_processes_end_where_one_does(way: str, step: str, trained: Path) -> None:
    alone = trained / "one" / f"fp32-plain-{step}"
    together = trained / "two" / f"fp32-{way}-{step}"
    assert figures(together) == pytest.approx(figures(alone), abs=1e-5)
    mine, theirs = weights(together), weights(alone)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 2e-6, name


@pytest.mark.parametrize("way", [way for way in WAYS if way != "zero0"])
def test_bf16_weights_have_fp32_routers_and_masters(way: str, trained: Path) -> None:
    alone, together = trained / "one" / "bf16-plain-soft", trained / "two" / f"bf16-{way}-soft"
    assert figures(together)["lm"] == pytest.approx(figures(alone)["lm"], rel=2e-3)
    assert figures(together)["sparsity"] == pytest.approx(figures(alone)["sparsity"], abs=0.03)
    for name, value in weights(together).items():
        assert value.dtype == (torch.float32 if is_router(name) else torch.bfloat16), name
        if is_router(name):
            assert not torch.equal(value, value.bfloat16().float()), name
            assert (value - weights(alone)[name]).abs().max() < 0.05, name


# --- every kind of router


@pytest.fixture(scope="module")
def trained_routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `trained`, of a host with each kind of router."""
    return by_one_and_two(tmp_path_factory, "routers")


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_trains_in_two_processes_as_in_one(kind: str, trained_routers: Path) -> None:
    alone = trained_routers / "one" / f"fp32-plain-{kind}"
    together = trained_routers / "two" / f"fp32-plain-{kind}"
    assert figures(together) == pytest.approx(figures(alone), abs=1e-5)
    mine, theirs = weights(together), weights(alone)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 2e-6, name


@pytest.mark.parametrize("way", ["plain", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_trains_in_bf16(kind: str, way: str, trained_routers: Path) -> None:
    """Cast with its host, as DeepSpeed casts it: scores are computed in fp32 all the same."""
    exact = figures(trained_routers / "two" / f"fp32-plain-{kind}")
    rounded = figures(trained_routers / "two" / f"bf16-{way}-{kind}")
    assert rounded["lm"] == pytest.approx(exact["lm"], rel=1e-2)
    assert rounded["sparsity"] == pytest.approx(exact["sparsity"], abs=1e-6)  # top-k


# --- experts of an MoE host that have no token in one of the processes


@pytest.fixture(scope="module")
def trained_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `trained`, of an MoE host whose experts are taken apart."""
    return by_one_and_two(tmp_path_factory, "experts")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", EXPERT_STEPS)
def test_an_expert_without_a_token_stops_no_process(
    way: str, step: str, trained_experts: Path
) -> None:
    alone = trained_experts / "one" / f"fp32-plain-{step}"
    together = trained_experts / "two" / f"fp32-{way}-{step}"
    assert figures(together) == pytest.approx(figures(alone), abs=1e-5)
    mine, theirs = weights(together), weights(alone)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 2e-6, name


# --- looks at held-out text, a time limit, torch.compile


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `trained`, with looks; stopped by the clock of one process and taken up; compiled."""
    return by_one_and_two(tmp_path_factory, "loop")


def curve(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "figures.json").read_text())["history"]
    return {entry["step"]: entry["heldout_lm"] for entry in history if "heldout_lm" in entry}


@pytest.mark.parametrize("way", WAYS)
def test_processes_share_a_look_at_held_out_text(way: str, looped: Path) -> None:
    alone, together = looped / "one" / "plain" / "through", looped / "two" / way / "through"
    assert list(curve(alone)) == [2, 4, 6]
    assert curve(together) == pytest.approx(curve(alone), abs=1e-5)
    mine, theirs = weights(together), weights(alone)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 2e-6, name


@pytest.mark.parametrize("way", WAYS)
def test_the_clock_of_one_process_stops_all_and_they_go_on_bit_by_bit(
    way: str, looped: Path
) -> None:
    through, resumed = (looped / "two" / way / name for name in ("through", "resumed"))
    assert curve(resumed) == curve(through)
    mine, theirs = weights(resumed), weights(through)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "zero3"])
def test_processes_that_compile_end_where_those_that_do_not_do(way: str, looped: Path) -> None:
    eager, compiled = (looped / "two" / way / name for name in ("through", "compiled"))
    mine, theirs = weights(compiled), weights(eager)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 1e-5, name
    assert curve(compiled) == pytest.approx(curve(eager), abs=1e-5)


# --- gradients of several passes


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `trained`, of bf16 weights and 16 passes an optimizer step in all processes together."""
    return by_one_and_two(tmp_path_factory, "sums")


def test_bf16_gradients_of_two_processes_are_summed_in_fp32(summed: Path) -> None:
    """The sum of eight passes in each is exchanged, not its last gradient, and not in bf16."""
    alone, together = (summed / name / "plain" / "through" for name in ("one", "two"))
    assert figures(together) == pytest.approx(figures(alone), abs=1e-6)
    mine, theirs = weights(together), weights(alone)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 1e-7, name


@pytest.mark.parametrize("way", [way for way in WAYS if way != "zero0"])
def test_a_killed_run_of_summed_gradients_goes_on_bit_by_bit(way: str, summed: Path) -> None:
    through, resumed = (weights(summed / "two" / way / name) for name in ("through", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in through.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Way -> a weight of 1 after gradients that a bf16 sum loses."""
    folder = tmp_path_factory.mktemp("small")
    done = start(1, "small_gradients", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return figures(folder)


@pytest.mark.parametrize("way", DEEPSPEED_WAYS)
def test_deepspeed_sums_small_gradients_of_many_passes(way: str, small: dict[str, float]) -> None:
    """AdamW's first step is its rate; DeepSpeed alone sums in bf16, and the weight stays 1."""
    assert small[way] == pytest.approx(0.9, abs=0.004)


# --- whole runs


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, text.txt, recipe.yaml."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    save(build("llama"), folder / "donor", tokenizer())
    draw = random.Random(0)
    passages = [" ".join(draw.choices(WORDS, k=30)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(passages))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def words(output: str, *more: str) -> list[str]:
    given = ["train", "recipe.yaml", "--model", "donor", "--output", output, "--data", "text.txt"]
    return [*given, "--dtype", "fp32", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """through/ in one go; killed/ killed -9 in each stage, and taken up again."""
    zero = ("--deepspeed", "zero2", "--keep-steps")
    return {
        "through": start(2, "command", *words("through", *zero), cwd=work),
        **{
            f"killed in {mode}": start(
                *(2, "command", *words("killed", *zero)),
                cwd=work,
                MOE_TOOLS_TEST_KILL="4",
                MOE_TOOLS_TEST_MODE=mode,
            )
            for mode in ("soft", "hard")
        },
        "fewer": start(1, "command", *words("killed", *zero), cwd=work),
        "resumed": start(2, "command", *words("killed", *zero), cwd=work),
    }


def test_a_killed_run_ends_where_an_undisturbed_one_does(
    runs: dict[str, subprocess.CompletedProcess[str]], work: Path
) -> None:
    assert runs["killed in soft"].returncode and runs["killed in hard"].returncode
    for name in ("through", "resumed"):
        assert runs[name].returncode == 0, runs[name].stderr[-3000:]
    for step in ("2-train", "3-train"):
        mine = load_file(work / "killed" / "steps" / step / "model.safetensors")
        theirs = load_file(work / "through" / "steps" / step / "model.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_stage_that_is_done_is_not_done_again(
    runs: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    """Killed in the hard stage: the soft one was complete, and its checkpoint went on before."""
    for name in ("killed in hard", "resumed"):
        assert "step 0: split" not in runs[name].stderr
    assert "step 2: train" in runs["killed in hard"].stderr
    assert "step 2: train" not in runs["resumed"].stderr
    assert "step 3: train" in runs["resumed"].stderr


def test_fewer_passes_than_before_are_refused(
    runs: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    assert runs["fewer"].returncode == 2
    said = runs["fewer"].stderr
    assert "checkpoint-2 was written by 2 processes under ZeRO-2, 2 passes an optimizer" in said
    assert "but this run has 1: set `accumulate`" in said
    assert "Traceback" not in said


def test_only_the_first_process_speaks(
    runs: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    assert runs["through"].stderr.count("step 3: train") == 1


def test_the_folder_needs_no_deepspeed(
    runs: dict[str, subprocess.CompletedProcess[str]], work: Path
) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import moe_tools; from moe_tools.experts.experts import expert_ffns\n"
        "model = moe_tools.load(sys.argv[1]); assert len(expert_ffns(model)) == 2"
    )
    command = [sys.executable, "-c", code, str(work / "through")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    stock = load_stock(LlamaForCausalLM, work / "through").state_dict()
    ours = load(work / "through")
    host = {name for name in ours.state_dict() if not is_router(name)}
    assert host == set(stock) and expert_ffns(ours)
    assert all(torch.equal(ours.state_dict()[name], stock[name]) for name in host)


def test_other_verbs_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["--local_rank=0", "evaluate", "x"]) == 2
    assert "evaluate runs in one process: start it without torchrun" in capsys.readouterr().err
