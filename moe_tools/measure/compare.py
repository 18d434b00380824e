"""Converted models beside their donors and their dense controls, on the same tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_tools.data import blocks
from moe_tools.measure.evaluate import Evaluation, evaluate
from moe_tools.measure.report import Role, Row
from moe_tools.model.checkpoint import load, load_tokenizer
from moe_tools.model.conversion import read_conversion

logger = logging.getLogger(__name__)

CONTROL = "control"
"""Folder of the dense control inside a run's folder."""
METRICS = "metrics.json"


@dataclass(frozen=True)
class Setup:
    """What every row has in common."""

    data: str = "docs"
    """Its held-out part is the text."""
    tokens: int = 32768
    block_length: int = 512
    """Tokens."""
    batch_size: int = 4
    """Blocks of one forward pass."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    """Which tokens of an encoder's blocks are masked."""


def compare(sources: Sequence[str], setup: Setup, *, donor: str | None = None) -> list[Row]:
    """Evaluates model folders, each beside its donor and its `control` folder, if it has them.

    Perplexities are comparable only over the same tokens: all models must share the tokenizer of
    the first. A donor that only `config.json` names, and that cannot be loaded any more, is left
    out with a warning.

    Args:
        sources: dense or converted models: folders, hub ids or GGUF files.
        setup: text, dtype and device of every row.
        donor: stands in for the donor that each folder names.

    Returns:
        Donors first, then each source after its control; a model that is named twice has one row.

    Raises:
        ValueError: a model that cannot be loaded, another tokenizer, or text that is not there.
        FloatingPointError: a loss that is not finite.
    """
    bench = _Bench(setup, load_tokenizer(sources[0]))
    for source in sources:
        bench.measure(source)
    if donor is not None:
        bench.measure(donor)
    donors = {source: donor or bench.find_donor(source) for source in sources}
    rows = {name: bench.row(name, "donor") for name in donors.values() if name is not None}
    for source in sources:
        control = _control(source)
        if control is not None:
            bench.measure(control)
            rows.setdefault(control, bench.row(control, "control", donors[source]))
        rows.setdefault(source, bench.row(source, "model", donors[source], control))
    return list(rows.values())


class _Bench:
    """Evaluates each model once."""

    def __init__(self, setup: Setup, tokenizer: PreTrainedTokenizerBase) -> None:
        self.setup = setup
        self.tokenizer = tokenizer
        self.blocks_BT = _text(setup, tokenizer)
        self.done: dict[str, Evaluation] = {}
        self.named_donors: dict[str, str | None] = {}

    def measure(self, source: str) -> None:
        """Loads and evaluates a model, unless that is done."""
        if source in self.done:
            return
        setup = self.setup
        _check_tokenizer(source, self.tokenizer)
        model = load(source, dtype=setup.dtype, device=setup.device)
        conversion = read_conversion(model)
        self.named_donors[source] = None if conversion is None else conversion.donor
        self.done[source] = evaluate(
            model,
            self.blocks_BT,
            batch_size=setup.batch_size,
            title=source,
            mask_token=self.tokenizer.mask_token_id,
            seed=setup.seed,
        )

    def find_donor(self, source: str) -> str | None:
        """The donor that a converted folder names, if it can still be evaluated."""
        donor = self.named_donors[source]
        if donor is None:
            return None
        try:
            self.measure(donor)
        except ValueError as error:
            logger.warning("no row for the donor of %s, give --donor: %s", source, error)
            return None
        return donor

    def row(
        self, source: str, role: Role, donor: str | None = None, control: str | None = None
    ) -> Row:
        """One line, relative to a donor and a control."""
        seen, setup = self.done[source], self.setup

        def ratio(other: str | None) -> float | None:
            return None if other is None else seen.perplexity / self.done[other].perplexity

        return Row(
            model=source,
            role=role,
            perplexity=seen.perplexity,
            nats_per_token=seen.nats_per_token,
            ratio_to_control=ratio(control),
            ratio_to_donor=ratio(donor),
            ffn_sparsity=seen.ffn_sparsity,
            ffn_dense_flops=seen.flops.ffn_dense,
            ffn_flops=seen.flops.ffn,
            router_flops=seen.flops.router,
            total_flops=seen.flops.total,
            total_dense_flops=seen.flops.total_dense,
            train_tokens=_train_tokens(source),
            tokens=seen.tokens,
            seconds=seen.seconds,
            data=setup.data,
            block_length=setup.block_length,
            dtype=str(setup.dtype).removeprefix("torch."),
            device=setup.device,
            layer_sparsity=seen.layer_sparsity,
        )


def _text(setup: Setup, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return blocks(
        setup.data, tokenizer, split="heldout", length=setup.block_length, tokens=setup.tokens
    )


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        other = load_tokenizer(source)
    except ValueError:
        return  # weights only: the caller says that they belong together
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{source} has another tokenizer than {tokenizer.name_or_path}, so their perplexities "
            "cannot be compared: evaluate them one by one"
        )


def _control(source: str) -> str | None:
    folder = Path(source) / CONTROL
    return str(folder) if (folder / "config.json").is_file() else None


def _train_tokens(source: str) -> int | None:
    """What the run that wrote a folder says about its training."""
    try:
        metrics = json.loads((Path(source) / METRICS).read_text())
    except (OSError, ValueError):
        return None
    tokens = metrics.get("train_tokens") if isinstance(metrics, dict) else None
    return tokens if isinstance(tokens, int) else None
