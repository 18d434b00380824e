"""A teacher on disk: for every token of a train step's text its most likely tokens, written once.

A folder of files, each of `TOGETHER` batches, in the order of training:

    ids_PK    int32  tokens, the most likely first
    logp_PL   fp16   their log-probabilities, then that of all other tokens together
    ends_B    int64  where each batch ends among the positions

fp16 rounds a log-probability by 0.004 at most down to e^-16, so a probability by 0.4 %;
`top_k_losses` makes them sum to 1 again. A file has its name once it is whole, and a killed run
goes on at the first that is missing. Reading maps the file: no more of it is in memory than what a
batch asks for.

Letters: B batches, P positions of several batches, T tokens of one, K tokens that are kept,
L = K + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.atomic import new_file
from moe_tools.data import Batch
from moe_tools.data.progress import progress
from moe_tools.hosts.inputs import model_inputs
from moe_tools.training.top_k_losses import keep_top

TOGETHER = 64
"""Batches of one file."""


def bytes_each(k: int) -> int:
    """Bytes on disk of one position."""
    return 4 * k + 2 * (k + 1)


class CachedTeacher:
    """What a teacher says of each batch of a train step, read from its files."""

    def __init__(self, folder: Path, batches: int) -> None:
        self.folder, self.batches = folder, batches

    @property
    def missing(self) -> list[int]:
        """The first batch of every file that is not there yet."""
        firsts = range(0, self.batches, TOGETHER)
        return [first for first in firsts if not self._file(first).is_file()]

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        """ids_TK and logp_TL of one batch; the second as int16 that `as_logp` takes.

        DeepSpeed casts every floating-point tensor of a batch to the dtype of the weights.
        """
        first = batch - batch % TOGETHER
        with safe_open(self._file(first), framework="pt") as file:
            ends = file.get_tensor("ends_B")
            start = int(ends[batch - first - 1]) if batch > first else 0
            rows = slice(start, int(ends[batch - first]))
            ids_TK, logp_TL = (file.get_slice(name)[rows] for name in ("ids_PK", "logp_PL"))
        return {"teacher_ids": ids_TK, "teacher_logp": logp_TL.view(torch.int16)}

    def write(self, load: Callable[[], PreTrainedModel], batches: Sequence[Batch], k: int) -> None:
        """Writes the files that are missing; the teacher is loaded if there are any.

        Args:
            load: gives the teacher.
            batches: of the train step, all of them.
            k: tokens that are kept of each position, at most the vocabulary.

        Raises:
            ValueError: the disk refuses.
        """
        missing = self.missing
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        teacher = load().eval()
        with progress("teacher", len(missing), "file") as bar:
            for first in missing:
                tensors = _of(teacher, batches[first : first + TOGETHER], k)
                with new_file(self._file(first)) as partial:
                    save_file(tensors, partial)
                bar.update()

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08}.safetensors"


def as_logp(teacher_logp: Tensor) -> Tensor:
    """logp_TL of a batch that `CachedTeacher` gave."""
    return teacher_logp.view(torch.float16)


@torch.inference_mode()
def _of(teacher: PreTrainedModel, batches: Sequence[Batch], k: int) -> dict[str, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    options = {"use_cache": False} if teacher.can_generate() else {}
    for batch in batches:
        inputs = model_inputs(teacher, batch.to(teacher.device))
        logits_TV = teacher(**inputs, **options).logits.flatten(0, -2)
        ids_TK, logp_TL = keep_top(logits_TV, min(k, logits_TV.shape[-1]))
        found.append((ids_TK.int().cpu(), logp_TL.half().cpu()))
    ends = torch.tensor([len(ids_TK) for ids_TK, _ in found]).cumsum(0)
    ids, logp = zip(*found, strict=True)
    return {"ids_PK": torch.cat(ids), "logp_PL": torch.cat(logp), "ends_B": ends}
