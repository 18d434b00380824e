"""One evaluated model, and the row that it makes beside its donor and its control."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_tools.experts.prediction import merge_predictions
from moe_tools.measure.evaluate import Evaluation
from moe_tools.measure.traffic import Traffic
from moe_tools.names import CONFIG, CONTROL, METRICS
from moe_tools.report.report import Role, Row
from moe_tools.report.setup import Setup


@dataclass(frozen=True)
class Entry:
    """One evaluated model."""

    name: str
    """Tells it from all others: its folder, or its folder and its setting, or a baseline."""
    folder: str
    """The model's folder; for a baseline, the donor's."""
    evaluation: Evaluation
    tasks: dict[str, float] = field(default_factory=dict)
    """"task metric" of lm-evaluation-harness -> figure."""
    setting: dict[str, float] = field(default_factory=dict)
    """The knob of its selectors, or the share of dropped inputs, where it is not the saved one."""
    series: str = ""
    """The line of a plot that it belongs to, where that is not its folder."""
    control: str | None = None
    """The folder of its dense control."""
    donor: str | None = None
    """The donor that a converted model names."""

    @property
    def title(self) -> str:
        """What the table calls it; a setting has a place of its own in a row."""
        return self.name if self.series else self.folder

    @property
    def stands(self) -> bool:
        """Whether it is what the folder holds, maybe at another setting, and no baseline on it."""
        return self.name == self.folder or bool(self.setting)

    def ratio(self, other: Entry | None) -> float | None:
        """Divides its perplexity by another's; None without another, and where there is none."""
        if other is None or self.evaluation.accuracy is not None:
            return None
        if math.isnan(self.evaluation.perplexity):
            return None
        return self.evaluation.perplexity / other.evaluation.perplexity


def row(
    entry: Entry,
    role: Role,
    setup: Setup,
    text: str,
    *,
    donor: Entry | None = None,
    control: Entry | None = None,
) -> Row:
    """Makes a line of the table, relative to a donor and a control; `text` is a fingerprint."""
    seen, run = entry.evaluation, _run(entry.folder)
    return Row(
        model=entry.title,
        role=role,
        series=entry.series,
        setting=entry.setting,
        perplexity=_number(seen.perplexity),
        accuracy=seen.accuracy,
        nats_per_token=_number(seen.nats_per_token),
        ratio_to_control=entry.ratio(control),
        ratio_to_donor=entry.ratio(donor),
        ffn_sparsity=seen.ffn_sparsity,
        ffn_dense_flops=seen.flops.ffn_dense,
        ffn_flops=seen.flops.ffn,
        router_flops=seen.flops.router,
        total_flops=seen.flops.total,
        total_dense_flops=seen.flops.total_dense,
        train_tokens=run.get("train_tokens"),
        tokens=seen.tokens,
        text=text,
        run_text=run.get("text", ""),
        **(_made_by(run) if entry.stands else {}),
        seconds=seen.seconds,
        data=setup.measured,
        protocol=setup.called,
        stride=setup.stride,
        block_length=setup.block_length,
        after=setup.after,
        dtype=str(setup.dtype).removeprefix("torch."),
        device=setup.device,
        layer_sparsity=seen.layer_sparsity,
        zeros=seen.zeros,
        tasks=seen.figures | entry.tasks,
        **_prediction(seen),
        few_bit_ops=seen.flops.few_bit_ops,
        **_bytes(seen),
        two_levels=None if seen.two_levels is None else asdict(seen.two_levels),
        moe_layers={name: asdict(levels) for name, levels in seen.moe_layers.items()},
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def find_control(folder: str) -> str | None:
    """Finds the dense control inside a run's folder, if it has one."""
    found = Path(folder) / CONTROL
    return str(found) if (found / CONFIG).is_file() else None


def _bytes(seen: Evaluation) -> dict[str, Any]:
    """Returns the fields of a row that speak of bytes."""
    if not seen.traffic:
        return {}
    one, *others = seen.traffic.values()
    return {
        "ffn_dense_bytes": one.ffn_dense,
        "ffn_bytes": one.ffn,
        "scoring_bytes": one.scoring,
        "total_bytes": one.total,
        "total_dense_bytes": one.total_dense,
        "together": {str(more.tokens): _plain(more) for more in others},
    }


def _plain(traffic: Traffic) -> dict[str, float]:
    names = ("ffn_dense", "ffn", "scoring", "total", "total_dense")
    return {name: getattr(traffic, name) for name in names}


def _prediction(seen: Evaluation) -> dict[str, Any]:
    """Returns the fields of a row that speak of neuron predictors."""
    if not seen.predictions:
        return {}
    overall = merge_predictions(seen.predictions.values())
    each = {name: one.figures() for name, one in seen.predictions.items() if one.seen}
    return {"recall": overall.recall, "precision": overall.precision, "layer_prediction": each}


def _made_by(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row that tell repeats of a run by their seeds."""
    return {
        "method": run.get("recipe", ""),
        "seed": run.get("seed"),
        "but_seed": run.get("but_seed", ""),
    }


def _run(folder: str) -> dict[str, Any]:
    """Returns what the run that wrote a folder says of its training; nothing if none did."""
    try:
        metrics = json.loads((Path(folder) / METRICS).read_text())
    except (OSError, ValueError):
        return {}
    kinds = {"train_tokens": int, "text": str, "recipe": str, "seed": int, "but_seed": str}
    known = metrics if isinstance(metrics, dict) else {}
    return {key: known[key] for key, kind in kinds.items() if isinstance(known.get(key), kind)}
