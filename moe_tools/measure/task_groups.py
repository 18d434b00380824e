"""The tasks of each paper's table, under one name: `--tasks turbosparse`.

A task is one of lm-evaluation-harness; its number of examples is the paper's. What a paper measured
by another program is asked here with the harness's own prompts, and comes near, not equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskGroup:
    """What one paper's table asks a model."""

    source: str
    """Paper and place."""
    shots: Mapping[str, int | None]
    """Task of the harness -> examples before the question; None: the paper gives none, and the
    harness's own number holds."""
    bos: bool | None = None
    """Whether prompts begin with the tokenizer's BOS; None: as the harness does it."""
    lacks: str = ""
    """What of the table is not asked, and why."""


GROUPS: dict[str, TaskGroup] = {
    "prosparse": TaskGroup(
        "ProSparse, arXiv 2402.13516, table 1; model card of SparseLLM/prosparse-llama-2-7b",
        {
            **dict.fromkeys(("piqa", "social_iqa", "hellaswag", "winogrande", "copa"), 0),
            **dict.fromkeys(("boolq", "lambada_openai"), 0),
            "gsm8k": 8,
            "mmlu": 5,
            "bbh_fewshot": 3,
            "agieval": 0,
        },
        # "abnormal results ... are probably attributed to the absence of the cls token <s>"
        bos=True,
        lacks="HumanEval and MBPP run code that a model wrote; the harness has TyDi QA with "
        "generated answers only, the paper chose among given ones",
    ),
    "turbosparse": TaskGroup(
        "TurboSparse, arXiv 2406.05955, section 6.1 and table 6",
        {
            "arc_challenge": 25,
            "hellaswag": 10,
            "mmlu": 5,
            "truthfulqa_mc2": 0,
            "winogrande": 5,
            "gsm8k": 8,
            **dict.fromkeys(("piqa", "sciq", "arc_easy", "openbookqa")),
        },
    ),
    "lte": TaskGroup(
        "LTE, arXiv 2402.06126, few-shot MMLU after instruction tuning",
        {"mmlu": 5},
        lacks="GLUE, XSum, E2E and WikiText-103 are measured after fine-tuning on their own "
        "training text",
    ),
    "teal": TaskGroup(
        "TEAL, arXiv 2408.14690, section 5.1 and table 2",
        {
            "mmlu": 5,
            "arc_challenge": 25,
            "hellaswag": 10,
            "gsm8k": 5,
            "piqa": 0,
            "winogrande": 0,
        },
    ),
    "cmoe": TaskGroup(
        "CMoE, arXiv 2502.04416, README and zero_eval.py of github.com/JarvisPei/CMoE",
        dict.fromkeys(("piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag", "mmlu"), 0),
    ),
}
