"""Steps layer by layer: the same files as in memory, whatever the family or the step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import set_seed

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.recipe import Attach, Budget, Fit, Recipe, Refit, Split, Swap, Threshold, Train
from moe_tools.runs import stream as streaming
from moe_tools.runs.stream import Streamed, check_streams, is_large
from moe_tools.steps.step import Step, Work
from tests.families import FAMILIES, build, logits

BLOCKS_BT = torch.randint(3, 64, (9, 16), generator=torch.Generator().manual_seed(2))
"""Two whole batches of four blocks, and one block."""
SEED = 3
WEIGHTS = Split(8, method="kmeans", by="weights")
ACTIVATIONS = Split(8, shared_experts=1)
RELU = Swap({"kind": "relu"})
HALF = {"kind": "topk", "share": 0.5}
NORM = Attach("norm", selector={"kind": "topk", "k": 2})


@pytest.fixture(scope="session")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every family, in shards, with the names that the hub has."""
    folder = tmp_path_factory.mktemp("donors")
    for name in FAMILIES:
        torch.manual_seed(0)
        build(name).save_pretrained(folder / name, max_shard_size="20KB")
    return folder


def lend(folder: Path, donor: str) -> Work:
    """What a run gives a step that calibrates."""
    return Work(
        folder, donor, SEED, lambda _: BLOCKS_BT, lambda: pytest.fail(), lambda: pytest.fail()
    )


@dataclass(frozen=True)
class Chain:
    """The same steps on the same donor, in memory and layer by layer."""

    donor: Path
    out: Path
    dtype: torch.dtype = torch.float32

    def whole(self, *steps: Step) -> tuple[Path, list[dict[str, Any]]]:
        folder, measured = self.donor, []
        for index, step in enumerate(steps):
            set_seed(SEED)
            model = load(folder, dtype=self.dtype)
            work = self.out / f"whole-{index}.work"
            found = step.apply(model, lend(work, str(self.donor)))
            folder = self.out / f"whole-{index}"
            save(model, folder)
            measured.append(found)
        return folder, measured

    def streamed(self, *steps: Step) -> tuple[Path, list[dict[str, Any]]]:
        folder, measured = self.donor, []
        for index, step in enumerate(steps):
            set_seed(SEED)
            one = self.one(step, folder, index)
            measured.append(one.run())
            folder = self.out / f"streamed-{index}"
            one.save(folder, None)
        return folder, measured

    def one(self, step: Step, source: Path, index: int) -> Streamed:
        return Streamed(
            str(source),
            self.out / f"streamed-{index}.work",
            step,
            BLOCKS_BT if step.needs_text() else None,
            donor=str(self.donor),
            seed=SEED,
            dtype=self.dtype,
            device="cpu",
        )


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def assert_same(chain: Chain, *steps: Step) -> Path:
    """The same tensors and figures, and the same files but for the shards."""
    (whole, measured), (streamed, also) = chain.whole(*steps), chain.streamed(*steps)
    a, b = tensors(whole), tensors(streamed)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    for path in whole.glob("*.json"):
        assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name
    assert measured == also
    return streamed


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_alone(name: str, donors: Path, tmp_path: Path) -> None:
    steps = (RELU, WEIGHTS, Attach("sigmoid", start="open"))
    out = assert_same(Chain(donors / name, tmp_path), *steps)
    assert torch.isfinite(logits(load(out))).all()


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("t5")])
def test_with_activations(name: str, donors: Path, tmp_path: Path) -> None:
    steps = (ACTIVATIONS, Attach(start_sparsity=0.3), Refit())
    out = assert_same(Chain(donors / name, tmp_path), *steps)
    assert all(ffn.bias_D is not None for ffn in expert_ffns(load(out)))


CHAINS: dict[str, tuple[Step, ...]] = {
    "a theta for each FFN": (RELU, Swap({"kind": "fatrelu"}, max_error=0.3), WEIGHTS, Attach()),
    "an activation that no stock class knows": (Swap({"kind": "drelu"}), WEIGHTS),
    "routers that start at random": (Split(10, method="random"), NORM),
    "routers that are trained": (WEIGHTS, NORM, Fit(epochs=2, batch_size=16)),
    "predictors of neurons": (RELU, Split(1), Attach("low_rank"), Fit(epochs=1, batch_size=16)),
    "representatives": (Split(8, by="marks"), Attach("representative", when_off="mean")),
    "a graph": (Split(8, method="coactivation"), Attach("mlp")),
    "down projections without constants": (WEIGHTS, NORM, Refit(constants=False)),
    "down projections of neurons": (Split(1), Attach("oracle", selector=HALF), Refit()),
    "inputs that are dropped": (Threshold(0.5, where="all", spend="greedy"),),
    "inputs that are turned": (Threshold(0.3, where="all", rotate=True),),
    "inputs of what was chosen": (WEIGHTS, NORM, Threshold(0.3, sites="hidden")),
    "no text at all": (Split(8, method="contiguous"), Attach("mean_gate")),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_kind_of_step(chain: str, donors: Path, tmp_path: Path) -> None:
    assert_same(Chain(donors / "llama", tmp_path), *CHAINS[chain])


def test_in_bf16(donors: Path, tmp_path: Path) -> None:
    assert_same(Chain(donors / "llama", tmp_path, torch.bfloat16), ACTIVATIONS, Attach(), Refit())


@pytest.mark.parametrize("step", [NORM, replace(ACTIVATIONS, shared_experts=0)])
def test_a_killed_step_goes_on_at_the_layer_where_it_stopped(
    step: Step, donors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer before is not done again, and random numbers go on where they were."""
    source, _ = Chain(donors / "llama", tmp_path / "source").whole(WEIGHTS)
    if isinstance(step, Split):
        source = donors / "llama"
    whole, stopped = Chain(source, tmp_path / "a"), Chain(source, tmp_path / "b")
    done: list[str] = []

    apply = type(step).apply

    def die_in_the_second(self: Any, model: Any, work: Work) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(model.layer_path)
        return apply(self, model, work)

    monkeypatch.setattr(type(step), "apply", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        stopped.streamed(step)
    first = tmp_path / "b" / "streamed-0.work" / "0.safetensors"
    before = first.stat().st_mtime_ns
    monkeypatch.undo()
    resumed, _ = stopped.streamed(step)
    assert first.stat().st_mtime_ns == before
    expected, got = tensors(whole.streamed(step)[0]), tensors(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


# --- what does not stream

REFUSED: dict[str, tuple[str, tuple[Step, ...], dict[str, str], str]] = {
    "train": ("llama", (WEIGHTS, Train(tokens=64)), {}, "step 1, train, .* gradients go through"),
    "budget": ("llama", (WEIGHTS, Attach(), Budget(0.5)), {}, "step 2, budget, .* all layers"),
    "samples": ("llama", (WEIGHTS, Attach()), {"data": "self"}, "step 1, attach, .* whole donor"),
    "two chains": ("t5-relu", (WEIGHTS, Attach()), {}, "step 1, attach, .* encoder-decoder"),
    "a classifier": ("bert", (WEIGHTS,), {"task": "classify"}, "step 0, split, .* new head"),
    "a file of its own": ("x.gguf", (WEIGHTS,), {}, "step 0, split, .* GGUF"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_stream_is_named_with_the_reason(case: str, donors: Path) -> None:
    donor, steps, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_streams(Recipe("r", steps, **options), str(donors / donor))  # type: ignore[arg-type]


def test_weights_alone_need_no_chain_of_layers(donors: Path) -> None:
    recipe = Recipe("r", (RELU, WEIGHTS, Attach(start="open")), data="self")
    check_streams(recipe, str(donors / "t5-relu"))


def test_large_is_half_of_the_free_memory(donors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = str(donors / "llama")
    weights = sum(parameter.numel() for parameter in load(donor).parameters())
    for free, dtype, large in (
        (4 * weights + 1, torch.bfloat16, False),
        (4 * weights - 4, torch.bfloat16, True),
        (8 * weights - 4, torch.float32, True),
    ):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda memory=memory: memory)
        assert is_large(donor, dtype) is large
