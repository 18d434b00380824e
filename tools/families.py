"""Checks every language model family of the installed transformers, and writes docs/families.md.

    python -m tools.families                         # all of them, some minutes
    python -m tools.families --kind causal --only llama gemma3
    python -m tools.families --odd --json odd.json   # odd sizes; writes no page

Each family runs in a process of its own: one that crashes or hangs is a row of the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tools.family_checks import Family, Outcome, Report, check
from tools.family_page import page

KINDS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 120.0
"""The most that a family may take: the slowest takes about five."""


CI_FAMILIES = (
    # gated, in a module: plain, composite, multipliers, statistics over neurons, xIELU
    "causal:llama", "causal:gemma2", "causal:qwen3_5", "causal:falcon_h1", "causal:gemma3n_text",
    "causal:apertus",
    # gate and up in one linear; a functional activation; two modules over one storage
    "causal:phi3", "causal:modernbert-decoder", "causal:lfm2", "causal:zamba",
    # without a gate: Conv1D, relu2, parallel to attention, Sequential, dropouts in and after it
    "causal:gpt2", "causal:nemotron", "causal:falcon", "causal:ctrl", "causal:prophetnet",
    # in the layer, its dropout a function; the residual inside; more between up and down
    "causal:bert", "causal:opt", "causal:xglm", "causal:bloom", "causal:xlnet", "causal:rwkv",
    "causal:cpmant",
    # fused experts: as Mixtral's, shared, beside dense FFNs, every flag, gates of their own
    "causal:mixtral", "causal:qwen2_moe", "causal:jamba", "causal:granitemoehybrid",
    "causal:gpt_oss", "causal:aria_text", "causal:nemotron_h", "causal:deepseek_v4",
    "causal:minimax_m3_vl_text",
    # experts without flags
    "causal:llama4_text", "causal:dbrx", "causal:longcat_flash", "causal:inkling_text",
    # one module for all layers; encoder-decoders; experts in a list
    "masked:albert", "masked:modernbert", "seq2seq:t5", "seq2seq:bart",
    "seq2seq:switch_transformers",
)  # fmt: skip
"""Every layout and every kind of experts at least once: the table's tests on each push."""
REFUSED = {"causal:bitnet": "prove", "causal:jetmoe": "find", "causal:mamba": "find"}
"""Families that have to be refused -> by which check."""


def families(kinds: Sequence[str] = tuple(KINDS)) -> list[Family]:
    """Lists the families of the installed transformers; one may be of several kinds."""
    found = [Family(kind, name, KINDS[kind][name]) for kind in kinds for name in KINDS[kind]]
    return sorted(found, key=lambda family: (list(KINDS).index(family.kind), family.name))


def family_of(label: str) -> Family:
    """The family that `CI_FAMILIES` and `REFUSED` write as kind:name."""
    kind, name = label.split(":")
    return Family(kind, name, KINDS[kind][name])


def check_all(wanted: Sequence[Family], jobs: int, **options: Any) -> Iterator[Report]:
    """Checks families, `jobs` at a time, in the order in which they end.

    Args:
        wanted: the families.
        jobs: processes.
        options: of `check`.
    """
    waiting, running = list(reversed(wanted)), list[_Worker]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Worker(waiting.pop(), options))
        wait([worker.inbox for worker in running], min(worker.left for worker in running))
        done = [worker for worker in running if worker.inbox.poll() or worker.left <= 0]
        running = [worker for worker in running if worker not in done]
        yield from (worker.report() for worker in done)


class _Worker:
    """A process that checks one family. It is forked: importing transformers takes longer."""

    def __init__(self, family: Family, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.family = family
        self.inbox, outbox = context.Pipe(duplex=False)
        self._end = time.monotonic() + SECONDS
        self._process = context.Process(target=_work, args=(family, options, outbox), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks, where threads run
            self._process.start()
        outbox.close()  # else a crash would not close the pipe

    @property
    def left(self) -> float:
        """Seconds until it is stopped."""
        return max(0.0, self._end - time.monotonic())

    def report(self) -> Report:
        """What the process found; a report that says so, if it crashed or is stopped now."""
        try:
            report: Report = self.inbox.recv() if self.inbox.poll() else self._lost("too slow")
        except EOFError:
            self._process.join()
            report = self._lost(f"the process died: {self._process.exitcode}")
        self._process.kill()
        self._process.join()
        return report

    def _lost(self, why: str) -> Report:
        return Report(self.family, outcomes={"run": Outcome("failed", why=why)})


def _work(family: Family, options: dict[str, Any], outbox: Connection) -> None:
    with open(os.devnull, "w") as nowhere:  # what a family prints is no part of the table
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    outbox.send(check(family, **options))


def main() -> None:
    """Runs the command line."""
    args = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    wanted = [each for each in families(args.kind) if not args.only or each.name in args.only]
    running = check_all(wanted, args.jobs, seed=args.seed, odd=args.odd)
    reports = list(tqdm(running, total=len(wanted), unit="family"))
    reports.sort(key=lambda report: wanted.index(report.family))
    for report in reports:
        if not report.passes:
            print(f"{report.family.name}: {report.failure}")
    print(f"{sum(report.passes for report in reports)} of {len(reports)} pass every check")
    if args.json:
        args.json.write_text(json.dumps([report.to_dict() for report in reports], indent=1) + "\n")
    if len(wanted) == len(families()) and not args.odd:
        PAGE.write_text(page(reports), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types only")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--odd", action="store_true", help="odd sizes, biases, tied embeddings")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write every outcome")
    return parser.parse_args()


if __name__ == "__main__":
    main()
