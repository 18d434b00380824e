"""Writes docs/families.md: counts, and a row for every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers

from tools.family_checks import Report

INTRO = """# Families

Which model families moe-tools converts. Written by `make families`: do not edit.

transformers {transformers}, torch {torch}. Of every family that this transformers can build for
language modelling, a tiny random model goes through these checks: its FFNs are found, and proven to
be computed as moe-tools computes them; reordered neurons change no logit; with experts of 8 neurons
and random routers, and every expert on, the logits are the dense model's; the saved folder gives
the routed model again with moe-tools, and the dense one with transformers alone; with a cache, it
writes the dense model's tokens. No trained weights are involved.
"""
TABLE = """
## {title}

| family | class | FFNs | fused experts | found | proven | logits | text | why not |
|---|---|---|---|---|---|---|---|---|
"""
TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Encoder-decoders",
}
LOGITS = ("permute", "all_on", "load", "stock")
"""Checks that compare logits; but for `permute`, which adds in another order, they can be exact."""


def page(reports: Sequence[Report]) -> str:
    """The whole page."""
    head = INTRO.format(transformers=transformers.__version__, torch=torch.__version__)
    return head + _summary(reports) + "".join(_table(reports, kind) for kind in TITLES)


def _summary(reports: Sequence[Report]) -> str:
    rows = {
        "causal language models": [each for each in reports if each.family.kind == "causal"],
        "masked language models, encoder-decoders": [
            each for each in reports if each.family.kind != "causal"
        ],
        "of all these, with fused experts": [each for each in reports if each.experts],
    }
    said = "\n| | families | built | found | proven | logits equal | every check |\n"
    said += "|---|---|---|---|---|---|---|\n"
    for name, group in rows.items():
        tests: list[Callable[[Report], bool]] = [
            lambda each: _passed(each, "run"),
            lambda each: _passed(each, "find"),
            lambda each: _passed(each, "prove"),
            lambda each: all(_passed(each, check) for check in LOGITS),
            lambda each: each.passes,
        ]
        counts = [sum(test(each) for each in group) for test in tests]
        said += f"| {name} | {len(group)} | {' | '.join(map(str, counts))} |\n"
    return said


def _passed(report: Report, check: str) -> bool:
    outcome = report.outcomes.get(check)
    return outcome is not None and outcome.status != "failed"


def _table(reports: Sequence[Report], kind: str) -> str:
    rows = [_row(report) for report in reports if report.family.kind == kind]
    return TABLE.format(title=TITLES[kind]) + "".join(rows)


def _row(report: Report) -> str:
    family = report.family
    cells = [family.name, f"`{family.model_class}`", report.layouts, report.experts]
    cells += [_mark(report, "find"), _mark(report, "prove"), _logits(report)]
    cells += [_mark(report, "generate"), report.failure.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |\n"


def _mark(report: Report, check: str) -> str:
    outcome = report.outcomes.get(check)
    if outcome is None or outcome.status == "skipped":
        return "-"
    return "no" if outcome.status == "failed" else "yes"


def _logits(report: Report) -> str:
    """Exact, or the largest difference; a reordering of neurons counts only where it fails."""
    outcomes = [report.outcomes.get(check) for check in LOGITS]
    known = [outcome for outcome in outcomes if outcome is not None]
    if len(known) < len(LOGITS) or any(outcome.status == "failed" for outcome in known):
        return "no"
    largest = max(outcome.difference for outcome in known[1:])
    return f"{largest:.0e}" if largest else "exact"
