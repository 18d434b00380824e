"""What every FFN saw and did on calibration text, on disk: memory stays that of one batch.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from moe_tools.atomic import new_file, settle
from moe_tools.data import Blocks
from moe_tools.experts.experts import ExpertFFN
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.raw_file import append_raw, map_raw

COMPLETE = "complete.json"
"""Written last: without it the cache is made again."""
Target = Callable[[ExpertFFN, Tensor], Tensor | None]
"""target_TR of an FFN from its h_TF; None: it has none."""
DTYPE = torch.bfloat16
"""How inputs are stored on disk."""


class ActivationCache:
    """A folder with the inputs and the targets of every FFN."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, model: nn.Module, ffns: list[ExpertFFN], blocks_BT: Blocks, of: Target) -> None:
        """Runs the model over the blocks, unless a complete cache is there."""
        if (self.folder / COMPLETE).is_file():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

        def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
            append_raw(self._file(index, "x"), x_TD.to(DTYPE))
            target_TR = of(ffns[index], h_TF)
            if target_TR is not None:
                append_raw(self._file(index, "target"), target_TR)

        visit_activations(model, blocks_BT, visit, title="cache activations")
        settle(self.folder)
        with new_file(self.folder / COMPLETE) as partial:
            partial.write_text(json.dumps({"tokens": blocks_BT.numel()}))

    def read(
        self,
        index: int,
        what: Literal["x", "target"],
        columns: int,
        dtype: torch.dtype = DTYPE,
    ) -> Tensor:
        """x_TD or target_TR of one FFN, mapped from the disk; targets are of the dtype they had."""
        return map_raw(self._file(index, what), dtype).view(-1, columns)

    def _file(self, index: int, what: str) -> Path:
        return self.folder / f"{index}.{what}"
