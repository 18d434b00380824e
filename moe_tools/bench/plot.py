"""Speed of the kernels over the share of neurons that are off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from moe_tools.bench.ways import BASELINE, KernelTiming
from moe_tools.extras import needed


def plot_kernels(timings: Sequence[KernelTiming], file: str | Path) -> None:
    """Writes a picture, in the format of the file's suffix: one panel for each number of tokens.

    A line is one way to compute the FFN with weights of one dtype; F.linear is at 1.
    """
    panels = sorted({timing.tokens for timing in timings})
    figure = needed("matplotlib.figure", "plot", "a plot").Figure(
        figsize=(1 + 4.5 * len(panels), 4.5), layout="constrained"
    )
    for axes, tokens in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines: dict[str, list[KernelTiming]] = defaultdict(list)
        for timing in timings:
            if timing.tokens == tokens and timing.sparsity:
                lines[f"{timing.operation}, {timing.dtype}"].append(timing)
        for name, own in lines.items():
            axes.plot([t.sparsity for t in own], [t.speedup for t in own], marker="o", label=name)
        axes.axhline(1.0, linestyle="dashed", color="gray", label=BASELINE)
        axes.set_title(f"{tokens} token{'s' if tokens > 1 else ''}")
        axes.set_xlabel("share of the neurons off")
        axes.set_ylabel(f"speed, times {BASELINE}")
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file)
