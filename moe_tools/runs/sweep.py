"""One checkpoint at many operating points: other settings of its selectors, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.experts.conversion import read_conversion, set_selectors
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.line import check_movable
from moe_tools.hosts.input_threshold import thresholds_in
from moe_tools.report.compare import Bench
from moe_tools.report.report import Row
from moe_tools.report.setup import Setup
from moe_tools.steps.budget import Budget, budget
from moe_tools.thresholds.rows import read_rows, set_input_sparsity

TENTHS = tuple(tenth / 10 for tenth in range(1, 10))
KNOBS = {"tau": TENTHS, "share": (*TENTHS, 1.0), "p": (*TENTHS, 0.95, 1.0)}
"""Settings that are tried when none are named."""


def sweep(
    sources: Sequence[str],
    setup: Setup,
    values: Sequence[float] = (),
    *,
    by_sparsity: bool = False,
    donor: str | None = None,
    beside: Callable[[Bench], None] | None = None,
) -> list[Row]:
    """Evaluates converted models at every value of their selectors' knob, one value for all FFNs.

    Args:
        sources: converted folders; they are read, and stay as they are.
        setup: text, dtype and device.
        values: of the knob (tau, share of top-k, p; without a router, the share of the inputs that
            thresholds drop); empty: `KNOBS`.
        by_sparsity: the values are shares that are off, of neurons by the router and of inputs by
            thresholds, whichever there are: one line for all FFNs, found on training text.
        donor: stands in for the donor that each folder names.
        beside: measures more on the same text, such as baselines.

    Returns:
        Donors and controls, where there are any, and a row for every folder and value.

    Raises:
        ValueError: a model is dense, or a value that its selector does not take.
    """
    bench = Bench(setup, sources[0])
    for source in sources:
        _check_sweeps(source, skeleton(source, task=bench.task))
    for source in sources:
        _sweep(bench, source, values, by_sparsity)
    if beside is not None:
        beside(bench)
    return bench.rows(donor)


def _check_sweeps(source: str, model: PreTrainedModel) -> None:
    if not expert_ffns(model) and not thresholds_in(model):
        raise ValueError(f"{source} has no router and no threshold: there is nothing to sweep")


def _sweep(bench: Bench, source: str, values: Sequence[float], by_sparsity: bool) -> None:
    model = bench.load(source)
    if by_sparsity:
        _sweep_sparsity(bench, source, model, values or TENTHS)
    elif expert_ffns(model):
        _sweep_knob(bench, source, model, values)
    else:
        _sweep_inputs(bench, source, model, values or TENTHS)


def _sweep_knob(bench: Bench, source: str, model: PreTrainedModel, values: Sequence[float]) -> None:
    ffns = expert_ffns(model)
    knob = ffns[0].selector.knob
    points = [
        (value, [ffn.selector.with_knob(value) for ffn in ffns]) for value in values or KNOBS[knob]
    ]
    for value, selectors in points:
        set_selectors(model, selectors)
        bench.measure_at({knob: value}, source, model)


def _sweep_inputs(
    bench: Bench, source: str, model: PreTrainedModel, values: Sequence[float]
) -> None:
    calibrated = read_rows(read_conversion(model))
    for value in values:
        set_input_sparsity(model, value, start=calibrated)
        bench.measure_at({"inputs": value}, source, model)


def _sweep_sparsity(
    bench: Bench, source: str, model: PreTrainedModel, values: Sequence[float]
) -> None:
    routed, dropping = expert_ffns(model), thresholds_in(model)
    calibrated = read_rows(read_conversion(model))
    steps = [Budget(value, "common") for value in values]
    for step in steps:  # before the first measurement
        step.check()
    if routed:
        check_movable(model)
    text = bench.calibration_BT if routed else None
    for value, step in zip(values, steps, strict=True):
        if dropping:
            set_input_sparsity(model, value, start=calibrated)
        if text is not None:
            budget(model, step, text)
        bench.measure_at({"sparsity": value}, source, model)
