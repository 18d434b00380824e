"""A step on a model larger than memory: layer by layer, from folder to folder.

In memory is one layer with what its step needs, or what stands around the layers (embeddings and
head). A layer that is done is a file: a killed step goes on at the first one that is missing. The
result equals that of the same step on the whole model, tensor by tensor.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.atomic import link, new_file
from moe_tools.checkpoint.loading import is_quantised_source, load
from moe_tools.checkpoint.parts import Part, layer_paths
from moe_tools.checkpoint.saving import save
from moe_tools.checkpoint.shards import write_index
from moe_tools.data.progress import progress
from moe_tools.data.tasks import HEADS
from moe_tools.experts.conversion import Conversion, read_conversion, write_conversion
from moe_tools.hosts.ffn import host_state_dict
from moe_tools.hosts.rows import Rows, read_rows, write_rows
from moe_tools.names import SINGLE
from moe_tools.recipe import Recipe
from moe_tools.steps.carry import Carried
from moe_tools.steps.step import NO_TEXT, Step, Work

SHARE = 0.5
"""Share of the free memory above which a model is streamed: a step on a whole one needs room."""


def is_large(source: str, dtype: torch.dtype) -> bool:
    """Whether the weights of a folder or hub id would take more than `SHARE` of the free memory."""
    if Path(source).suffix == ".gguf":
        return False
    model = load(source, dtype=dtype, device="meta")
    wanted = sum(parameter.nbytes for parameter in model.parameters())
    return wanted > SHARE * psutil.virtual_memory().available


def why_not(step: Step, recipe: Recipe, source: str) -> str | None:
    """Why a step of a recipe cannot be streamed; None: it can."""
    if Path(source).suffix == ".gguf":
        return "a GGUF file is read as a whole"
    if is_quantised_source(source):
        return "a quantised model is dequantised as a whole"
    if recipe.task in HEADS:
        return "a classifier may get a new head, which is made with the whole model"
    if step.whole_model is not None:
        return step.whole_model
    if not step.needs_text():
        return None
    if recipe.data == "self":
        return "it calibrates on samples of the donor, which the whole donor makes"
    if load(source, device="meta").config.is_encoder_decoder:
        return "it calibrates, and the layers of an encoder-decoder are no single chain"
    return None


def check_streams(recipe: Recipe, source: str) -> None:
    """Whether every step can be streamed.

    Raises:
        ValueError: the first that cannot, and why.
    """
    for index, step in enumerate(recipe.steps):
        reason = why_not(step, recipe, source)
        if reason is not None:
            raise ValueError(
                f"step {index}, {step.verb}, cannot run layer by layer: {reason}; leave "
                "--stream away, on a machine with memory for the whole model"
            )


@dataclass(frozen=True)
class Streamed:
    """One step of a run."""

    source: str
    """Folder or hub id of the model before the step."""
    work: Path
    """Folder of the layers that are done, and of nothing else."""
    step: Step
    text_BT: Tensor | None
    """Calibration text; None: the step needs none."""
    donor: str
    seed: int
    dtype: torch.dtype
    device: str

    def run(self) -> dict[str, Any]:
        """Every layer that is not done yet; returns what the step measured of all of them.

        Raises:
            ValueError: as the step says.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        carried = self._carried()
        with progress(self.step.verb, len(self.layers), "layer") as bar:
            for index in range(len(self.layers)):
                if not self._shard(index).is_file():
                    self._run_one(index, carried)
                    gc.collect()  # modules know each other: reference counts do not free a part
                bar.update()
        return self._measured()

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Writes the model into an empty folder, a shard a layer."""
        around = self._load(Part(self.layers))
        around.config = self._config()
        save(around, folder, tokenizer)
        shards = {name: self._shard(index) for index, name in enumerate(self._names()[1:])}
        for name, shard in shards.items():
            link(shard, folder / name)
        (folder / SINGLE).rename(folder / self._names()[0])
        write_index(folder)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers of the whole model."""
        return layer_paths(self._empty)

    def _run_one(self, index: int, carried: Carried | None) -> None:
        if index:
            torch.set_rng_state(torch.tensor(self._report(index - 1)["random"], dtype=torch.uint8))
        model = self._load(Part(self.layers, self.layers[index]))
        text_BT = NO_TEXT if carried is None else carried.enter(model, index)
        own = self.work / str(index)
        measured = self.step.apply(model, self._lend(own, text_BT))
        self._keep(index, model, measured)
        shutil.rmtree(own, ignore_errors=True)
        if carried is not None:
            carried.leave(index)

    def _lend(self, folder: Path, text_BT: Tensor) -> Work:
        """What the step gets for one layer: its text is blocks that are called by their numbers."""

        def refuse() -> Any:
            raise AssertionError("a step that trains the whole model is never streamed")

        return Work(folder, self.donor, self.seed, lambda _: text_BT, refuse, refuse)

    def _keep(self, index: int, model: PreTrainedModel, measured: dict[str, Any]) -> None:
        """The layer last: where it is, its report is, too."""
        conversion = read_conversion(model)
        assert conversion is not None
        report = {
            "measured": measured,
            "conversion": conversion.to_dict(),
            "random": torch.get_rng_state().tolist(),
        }
        with new_file(self._report_file(index)) as partial:
            partial.write_text(json.dumps(report))
        state = {key: tensor.contiguous() for key, tensor in host_state_dict(model).items()}
        with new_file(self._shard(index)) as partial:
            save_file(state, partial, metadata={"format": "pt"})

    def _carried(self) -> Carried | None:
        if self.text_BT is None:
            return None
        carried = Carried(self.work, self.layers, self.text_BT)
        carried.begin(self._load(Part(self.layers)))
        return carried

    def _measured(self) -> dict[str, Any]:
        reports = [self._report(index) for index in range(len(self.layers))]
        return self.step.merge([report["measured"] for report in reports])

    def _config(self) -> Any:
        """What the step makes of the whole model's, with what it found for each FFN."""
        blocks = [self._report(index)["conversion"] for index in range(len(self.layers))]
        found = [Conversion.from_dict(block) for block in blocks]
        empty = self._empty
        layouts = self._layouts(found)
        with torch.device("meta"):
            self.step.rehearse(empty, self.donor)
        conversion = read_conversion(empty)
        assert conversion is not None
        own = {ffn: act for one in found for ffn, act in one.activation_of.items()}
        conversion = replace(conversion, activation_of=own, layouts=layouts)
        if conversion.thresholds is not None:
            rows = {site: row for one in found for site, row in (one.thresholds or {}).items()}
            conversion = replace(conversion, thresholds=rows)
        write_conversion(empty, conversion)
        return empty.config

    def _layouts(self, found: list[Conversion]) -> dict[str, Any]:
        """The layouts of the whole model, as every layer was proven, now or in a step before."""
        before = read_conversion(self._empty)
        if before is not None and before.layouts is not None:
            return before.layouts
        rows: Rows = {}
        for layer, conversion in zip(self.layers, found, strict=True):
            own = read_rows(self._empty, conversion.layouts or {})
            rows |= {path: row for path, row in own.items() if f"{path}.".startswith(f"{layer}.")}
        return write_rows(self._empty, rows)

    @cached_property
    def _empty(self) -> PreTrainedModel:
        """The whole model without a number in it."""
        return load(self.source, dtype=self.dtype, device="meta")

    def _load(self, part: Part) -> PreTrainedModel:
        return load(self.source, dtype=self.dtype, device=self.device, part=part)

    def _names(self) -> list[str]:
        """Names of the shards: what stands around the layers comes first."""
        count = len(self.layers) + 1
        return [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]

    def _shard(self, index: int) -> Path:
        return self.work / f"{index}.safetensors"

    def _report_file(self, index: int) -> Path:
        return self.work / f"{index}.json"

    def _report(self, index: int) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._report_file(index).read_text())
        return report
