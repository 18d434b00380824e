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
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.data.batching import Batches
from moe_tools.data.rows import Epochs, of_blocks
from moe_tools.experts.conversion import attach_experts
from moe_tools.experts.routers import ROUTERS
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.recipe import Lora, Recipe, Train
from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed
from moe_tools.steps.launch import Launch
from moe_tools.steps.time_limit import TimeIsUp, TimeLimit
from moe_tools.training import zero
from moe_tools.training.arguments import training_arguments
from moe_tools.training.teacher import Donor
from moe_tools.training.train import train
from tests.families import THRESHOLD, build, randomize, routed
from tests.killed import Killed, kill_at
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
MOVED = ("plain", "zero0", "zero2", "zero3")
"""Ways whose checkpoints go on in another number of processes."""
DEEPSPEED_WAYS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
"""Those that train bf16 weights."""


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


def nothing_stays(launch: Launch) -> Launch:
    """ZeRO-3 that gathers a weight for the module that runs, and lets go of it at once.

    As it is shipped, it keeps a tiny model's weights once it has gathered them.
    """
    assert launch.deepspeed is not None
    keys = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
    given = launch.deepspeed["zero_optimization"] | {f"stage3_{key}": 0 for key in keys}
    return Launch(deepspeed={**launch.deepspeed, "zero_optimization": given})


def manners() -> None:
    """What processes say to each other; an assertion that fails ends the run."""
    rank = processes.rank()
    assert processes.on_first(lambda: f"from {rank}") == "from 0"
    assert not processes.all_agree(rank == 0) and processes.all_agree(rank < 2)
    rows = processes.gather_rows(torch.full((rank + 1, 3), float(rank)))
    assert rows.tolist() == [[0.0] * 3] + [[1.0] * 3] * 2
    mine = torch.full((3,), float(rank))
    processes.average_([mine])
    assert mine.tolist() == [0.5] * 3
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


def moe_host(mode: str, experts: int = 16) -> PreTrainedModel:
    """A host of 16 experts, of which a token passes two: in a block of 16 some have no token."""
    torch.manual_seed(0)
    model = build("mixtral", num_local_experts=experts)
    unfused_ffns(model)
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


def donor(dtype: torch.dtype) -> PreTrainedModel:
    """The dense model that `converted` starts from, its weights moved a little."""
    torch.manual_seed(0)
    model = build("llama")
    randomize(model)
    return model.to(dtype)


TAUGHT = replace(LTE, losses={"lm": 1.0, "distill": 1.0, "distill_ffn": 0.5})


def born(out: Path) -> None:
    """Trains models that come in shards, and such that come whole, under ZeRO-3."""
    for folder, model in (("routed", converted()), ("donor", donor(torch.float32))):
        if processes.rank() == 0:
            save(model, out / folder)
    if processes.rank() == 0:
        save(moe_host("soft", 4), out / "experts")
        save(build("mixtral", num_local_experts=4), out / "fused")
    processes.barrier()
    bf16, fp32 = (launches(dtype)["zero3"] for dtype in ("bf16", "fp32"))
    l1 = replace(DENSE, losses={"lm": 1.0, "l1": 0.01}, **SMALL)
    runs = {
        "lora": (STEPS["lora"], "routed", bf16),
        "experts": (EXPERT_STEPS["soft"], "experts", fp32),
        "fused": (l1, "fused", fp32),
        "taught": (replace(TAUGHT, lr=0.01, lr_unit="weights"), "routed", bf16),
    }
    for name, (step, source, launch) in runs.items():
        dtype = torch.bfloat16 if launch is bf16 else torch.float32
        for how in ("whole", "born"):
            weights = str(out / source) if how == "born" else None
            model = load(out / source, dtype=dtype, device="cpu" if weights is None else "meta")
            given, each = None, step
            if step.needs_donor():
                at = str(out / "donor")
                given = Donor(
                    lambda device, at=at, dtype=dtype: load(at, dtype=dtype, device=device), at
                )
                each = replace(step, teacher="whole" if how == "whole" else "sharded")
            each = replace(each, checkpoint_every=100)
            folder = out / f"{name}-{how}"
            figures = train(
                model, each, text(8), folder, donor=given, launch=launch, weights=weights
            )
            if processes.rank() == 0:
                keep(folder, figures, model)
            elif how == "born":
                assert all(param.is_meta for param in model.parameters())


def cached(out: Path) -> None:
    """Distils from a teacher on disk that the first process writes, and from one in memory."""
    teacher = donor(torch.float32)
    step = replace(LTE, losses={"lm": 1.0, "distill": 1.0}, teacher_top_k=1000)
    ways = launches("fp32")
    for way in ("plain", "zero3"):
        for place in ("whole", "cached"):
            model, each = converted(), replace(step, teacher=place)
            folder = out / f"{way}-{place}"
            figures = train(model, each, text(16), folder, donor=teacher, launch=ways[way])
            if processes.rank() == 0:
                keep(folder, figures, model)


def experts(out: Path) -> None:
    """Trains an MoE host in every way, where each process has another idle expert."""
    for way, launch in launches("fp32").items():
        for name, step in EXPERT_STEPS.items():
            model = moe_host(name)
            idle = idle_experts(model)
            step = replace(step, accumulate=2 // processes.count(), evaluate_every=2)
            folder, held_out = out / f"fp32-{way}-{name}", text(300)[294:]
            figures = train(model, step, text(12), folder, launch=launch, held_out=held_out)
            assert sum(count > 0 for count in idle) > 6
            if processes.rank() == 0:
                keep(folder, figures, model)


def routers(out: Path) -> None:
    """Trains every kind of router with its host: fp32 under DDP, bf16 also under ZeRO."""
    step = replace(SOFT, mode="straight", losses={"lm": 1.0}, **SMALL)
    for dtype, wanted in (("fp32", ["plain"]), ("bf16", ["plain", "zero2", "zero3"])):
        ways = launches(dtype)
        if "zero3" in ways:
            ways["zero3"] = nothing_stays(ways["zero3"])
        for way in [way for way in wanted if way in ways]:
            for kind in ROUTERS:
                torch.manual_seed(0)
                conversion = replace(THRESHOLD, router=kind, selector={"kind": "topk", "k": 3})
                model = build("llama")
                attach_experts(model, conversion)
                if dtype == "bf16":
                    model.to(torch.bfloat16)  # routers, too: their scores stay in fp32
                each = replace(step, accumulate=2 // processes.count())
                folder = out / f"{dtype}-{way}-{kind}"
                figures = train(model, each, text(8), folder, launch=ways[way])
                if processes.rank() == 0:
                    keep(folder, figures, model)


def sums(out: Path) -> None:
    """Trains bf16 weights in every way, with many passes an optimizer step, and once killed."""
    for way, launch in launches("bf16").items():
        step = replace(LTE, batch_size=1, accumulate=16 // processes.count(), checkpoint_every=1)
        for name in ("through", "killed", "resumed"):
            model = converted(torch.bfloat16)
            work = out / way / ("through" if name == "through" else "killed")
            if name == "killed":
                kill_at(model, 2 * step.accumulate + 1)  # in the last of three steps
                with pytest.raises(Killed):
                    train(model, step, text(BLOCKS), work, launch=launch)
                continue
            figures = train(model, step, text(BLOCKS), work, launch=launch)
            if processes.rank() == 0:
                keep(work, figures, model)


LOOKS = replace(SOFT, target_sparsity=0.4, evaluate_every=2, checkpoint_every=4)


def loop(out: Path) -> None:
    """Looks at held-out text in every way; stops by the clock of one process, and goes on."""
    step = replace(LOOKS, accumulate=2 // processes.count())
    held_out = text(300)[270:]  # 8 batches, the last of 2 blocks; of two processes 4 each
    for way, launch in launches("fp32").items():
        for name in ("through", "stopped", "resumed", "compiled"):
            model = converted()
            work = out / way / ("stopped" if name == "resumed" else name)
            now = launch
            if name == "compiled":
                if launch.zero_stage == 3:
                    continue  # it is refused
                now = replace(launch, compile=True)
            if name == "stopped":  # the clock of the last process alone
                last = processes.rank() == processes.count() - 1
                now = replace(launch, limit=TimeLimit(1e-9 if last else 1e3))
                with pytest.raises(TimeIsUp, match="after optimizer step 1 of 6"):
                    train(model, step, text(BLOCKS), work, launch=now, held_out=held_out)
                continue
            figures = train(model, step, text(BLOCKS), work, launch=now, held_out=held_out)
            if processes.rank() == 0:
                keep(out / way / name, figures, model)


def moved(out: Path) -> None:
    """Trains by PyTorch alone and under ZeRO, killed in the last steps, and goes on by others.

    Called by one process, by two and by one again: what each finds killed by the others it ends.
    Two processes see in one pass each what one process sees in two.
    """
    quick_deepspeed()
    count = processes.count()
    step = replace(LTE, router_lr=3e-3, accumulate=2 // count, checkpoint_every=2)
    for way in MOVED:
        launch = Launch()
        if way != "plain":
            path = deepspeed_path(way)
            given = read_deepspeed(path, Recipe("t", (step,)), dtype="fp32", processes=count)
            launch = (
                nothing_stays(Launch(deepspeed=given))
                if way == "zero3"
                else Launch(deepspeed=given)
            )
        for name in ("by one", "by two", "through"):
            work, mine = out / way / name, name == ("by one" if count == 1 else "by two")
            if (name == "through" and count == 1) or (work / "trained.safetensors").exists():
                continue
            model = converted()
            if mine:
                kill_at(model, 2 * step.accumulate + 1)  # in the last of three steps
                with pytest.raises(Killed):
                    train(model, step, text(24), work, launch=launch)
            elif name == "through" or work.exists():
                figures = train(model, step, text(24), work, launch=launch)
                if processes.rank() == 0:
                    keep(work, figures, model)
            processes.barrier()


SMALL_GRADIENTS = [1.0, *[2.0**-9] * 254, -1.0]
"""Their sum is 254/512; in bf16, where 1 + 2^-9 is 1, it is 0."""


class OneWeight(torch.nn.Module):
    """Eight equal weights, whose gradient is what the forward pass is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_F = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))

    def forward(self, grad: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return (self.weight_F.float() * grad).sum()


def small_gradients(out: Path) -> None:
    """Keeps what becomes of a weight of 1 after one DeepSpeed step on `SMALL_GRADIENTS`."""
    quick_deepspeed()
    import deepspeed

    step = Train(tokens=1, accumulate=len(SMALL_GRADIENTS))
    found = {}
    for name in DEEPSPEED_WAYS:
        path = deepspeed_path(name)
        given = read_deepspeed(path, Recipe("test", (step,)), dtype="bf16", processes=1)
        with zero.released():
            launch = Launch(deepspeed=given)
            arguments = training_arguments(step, out, 1, 0, launch, bf16=True)
            config = arguments.hf_deepspeed_config.config
        for key, value in [*config["zero_optimization"].items()]:
            if value == "auto":  # sizes of buffers
                del config["zero_optimization"][key]
        model = OneWeight()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for grad in SMALL_GRADIENTS:
            engine.backward(engine(torch.tensor(grad)))
            engine.step()
        with deepspeed.zero.GatheredParameters([model.weight_F]):
            found[name] = model.weight_F[0].item()
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(found))


def rows(out: Path) -> None:
    """Trains on a text of one epoch and a half, stopped once; keeps the rows of every pass."""
    rank, step = processes.rank(), replace(DENSE, batch_size=1, accumulate=2, checkpoint_every=1)
    found: dict[str, Any] = {}
    epochs = Epochs(of_blocks(text(16)), 1.5, seed=0)
    batches = Batches(epochs, "joined", step.batch_size)
    found["text"] = [batch.ids_BT.tolist() for batch in batches]
    for name in ("killed", "resumed"):
        model, seen = build("llama"), list[Any]()
        model.base_model.register_forward_pre_hook(
            lambda _, __, inputs, seen=seen: seen.append(inputs["input_ids"].tolist()),
            with_kwargs=True,
        )
        if name == "killed":
            kill_at(model, step.accumulate + 1)  # in the second of three steps
            with pytest.raises(Killed):
                train(model, step, batches, out / "work")
        else:
            train(model, step, batches, out / "work")
        found[name] = seen
    (out / f"{rank}.json").write_text(json.dumps(found))


def keep(folder: Path, figures: dict[str, Any], model: torch.nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "trained.safetensors")


def memory(key: str) -> int:
    """Bytes of this process: VmRSS is what it holds, VmHWM the most that it ever held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def measured(out: Path) -> None:
    """From here on a train step writes how much memory its process took: at first and at most.

    Until the first optimizer step, and from the last to the end. What others import is there then.
    """
    from moe_tools.training.trainer import RecipeTrainer

    base, most = memory("VmRSS"), {}
    begin, finish = RecipeTrainer.begin, RecipeTrainer.finish

    def note_begin(self: RecipeTrainer) -> None:
        most["load"] = memory("VmHWM") - base
        begin(self)

    def note_finish(self: RecipeTrainer) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        finish(self)
        most["end"] = memory("VmHWM") - base
        (out / f"{processes.rank()}.json").write_text(json.dumps(most))

    RecipeTrainer.begin, RecipeTrainer.finish = note_begin, note_finish


def command(words: list[str]) -> int:
    """`moe-tools WORDS`; with MOE_TOOLS_TEST_KILL=N, killed before optimizer step N.

    With MOE_TOOLS_TEST_MEMORY=FOLDER, each process says there what memory its train step took.
    """
    if "MOE_TOOLS_TEST_MEMORY" in os.environ:
        measured(Path(os.environ["MOE_TOOLS_TEST_MEMORY"]))
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


TASKS = (stages, born, cached, moved, experts, routers, sums, loop, small_gradients, rows)

if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "command":
        quick_deepspeed()
        sys.exit(command(words))
    with processes.process_group("cpu", alone=task in ("moved", "small_gradients")):
        if task == "stages" and processes.count() > 1:
            manners()
        tasks = {f.__name__: f for f in TASKS}
        tasks[task](Path(words[0]))
