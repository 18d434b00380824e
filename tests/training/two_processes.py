"""One of the processes of the distributed tests: `torchrun tests/training/two_processes.py TASK`.

Importing DeepSpeed costs more than training a tiny model: one start does several things, and what
needs no DeepSpeed does not import it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from moe_tools import processes
from moe_tools.cli.main import main
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.recipe import Lora, Recipe
from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed
from moe_tools.steps.launch import Launch
from moe_tools.training.train import train
from tests.families import THRESHOLD, build, randomize, routed
from tests.training.test_train import DENSE, HARD, SOFT, converted, text

LTE = replace(SOFT, target_sparsity=0.4, checkpoint_every=3)
STEPS = {
    "soft": LTE,
    "straight, checkpointing": replace(LTE, mode="straight", checkpointing=True),
    "hard": replace(HARD, target_sparsity=0.4),
    "lora": replace(LTE, lora=Lora(rank=4)),
}
BLOCKS = 48
"""Of 16 tokens: 6 optimizer steps of two processes."""
SMALL: dict[str, Any] = {"batch_size": 1, "lr": 3e-5, "router_lr": 3e-5}
"""One block a pass; and a host's router has gradients near Adam's epsilon, where rounding shows."""
EXPERT_STEPS = {
    "dense": replace(DENSE, losses={"lm": 1.0, "l1": 0.01}, **SMALL),
    "soft": replace(LTE, **SMALL),
    "hard": replace(HARD, **SMALL),
}
"""Of an MoE host."""


def quick_deepspeed() -> None:
    """No extension for all-reduce in shared memory: compiling it takes a minute, gloo does it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launches(dtype: str) -> dict[str, Launch]:
    """Every way to run a train step."""
    recipe = Recipe("test", (DENSE,))
    ways = {"plain": Launch()}
    if processes.count() > 1:
        quick_deepspeed()
        for name in ("zero0", "zero1", "zero2", "zero3")[dtype == "bf16" :]:
            config = read_deepspeed(
                deepspeed_path(name), recipe, dtype=dtype, processes=processes.count()
            )
            ways[name] = Launch(deepspeed=config)
    return ways


def manners() -> None:
    """What processes say to each other; an assertion that fails ends the run."""
    rank = processes.rank()
    assert processes.on_first(lambda: f"from {rank}") == "from 0"
    assert not processes.all_agree(rank == 0) and processes.all_agree(rank < 2)
    rows = processes.gather_rows(torch.full((rank + 1, 3), float(rank)))
    assert rows.tolist() == [[0.0] * 3] + [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="the first one's mistake"):
        processes.on_first(_mistake)
    with pytest.raises(ValueError, match="has 1 batches, but one optimizer step takes 2"):
        train(converted(), HARD, text(4), Path("unused"))


def _mistake() -> None:
    raise ValueError("the first one's mistake")


def stages(out: Path) -> None:
    """Trains every step in every way, and keeps figures and weights."""
    for dtype, names in (("fp32", STEPS), ("bf16", ["soft"])):
        for way, launch in launches(dtype).items():
            for name in names:
                model = converted(torch.float32 if dtype == "fp32" else torch.bfloat16)
                # One process sees in two passes what two see in one.
                step = replace(STEPS[name], accumulate=2 // processes.count())
                folder = out / f"{dtype}-{way}-{name}"
                figures = train(model, step, text(BLOCKS), folder, launch=launch)
                if processes.rank() == 0:
                    keep(folder, figures, model)


def moe_host(mode: str) -> PreTrainedModel:
    """A host of 16 experts, of which a token passes two: in a block of 16 some have no token."""
    torch.manual_seed(0)
    model = build("mixtral", num_local_experts=16)
    find_ffns(model)  # takes the experts apart
    if mode == "dense":
        return model
    model, _ = routed(model, THRESHOLD)
    randomize(model)
    return model


def idle_experts(model: torch.nn.Module) -> list[int]:
    """Grows by the experts without a token, a layer a forward pass."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, HostExperts):
            experts = len(module)
            module.register_forward_pre_hook(
                lambda _, args, experts=experts: found.append(experts - len(args[1].unique()))
            )
    return found


def experts(out: Path) -> None:
    """Trains an MoE host in every way, where each process has another idle expert."""
    for way, launch in launches("fp32").items():
        for name, step in EXPERT_STEPS.items():
            model = moe_host(name)
            idle = idle_experts(model)
            step = replace(step, accumulate=2 // processes.count())
            folder = out / f"fp32-{way}-{name}"
            figures = train(model, step, text(12), folder, launch=launch)
            assert sum(count > 0 for count in idle) > 6
            if processes.rank() == 0:
                keep(folder, figures, model)


def keep(folder: Path, figures: dict[str, Any], model: torch.nn.Module) -> None:
    (folder / "figures.json").write_text(json.dumps(figures))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "trained.safetensors")


def command(words: list[str]) -> int:
    """`moe-tools WORDS`; with MOE_TOOLS_TEST_KILL=N, killed before optimizer step N."""
    kill_at = int(os.environ.get("MOE_TOOLS_TEST_KILL", "0"))
    if kill_at:
        from moe_tools.training.trainer import RecipeTrainer

        enter_step = RecipeTrainer.enter_step

        def die(self: RecipeTrainer, step: int, steps: int) -> None:
            if step == kill_at and self.step.mode == os.environ["MOE_TOOLS_TEST_MODE"]:
                os.kill(os.getpid(), signal.SIGKILL)
            enter_step(self, step, steps)

        RecipeTrainer.enter_step = die
    return main(words)


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "command":
        quick_deepspeed()
        sys.exit(command(words))
    with processes.process_group("cpu"):
        if task == "experts":
            experts(Path(words[0]))
        else:
            if processes.count() > 1:
                manners()
            stages(Path(words[0]))
