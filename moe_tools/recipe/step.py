"""The steps of a recipe, one class a verb."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Swap:
    """Another activation in every FFN."""

    activation: dict[str, Any]
    """Its kind and what that takes, e.g. {kind: fatrelu, theta: 0.01}."""
    max_error: float | None = None
    """Chooses theta of fatrelu: in every FFN the largest at which ||y - y_theta||^2 / ||y||^2, of
    its output y on calibration text, is at most this."""
    align: bool = False
    """Of drelu: first turns neurons that mostly have a negative up row, up row and down column
    together. The model before the swap stays the same, dReLU keeps more of it."""
    tokens: int = 8192
    """Calibration tokens; only `max_error` and `align` need them."""


@dataclass(frozen=True)
class Split:
    """Which neurons share an expert; reorders them, changes no output."""

    expert_size: int = 8
    """Neurons of one expert; where it does not divide them, sizes differ by one."""
    method: Literal["kmeans", "coactivation", "random", "contiguous"] = "kmeans"
    by: Literal["activations", "marks", "weights"] = "activations"
    """What k-means sees of a neuron: |h| ||w_down|| on calibration text, the tokens where it is
    one of the 10 largest |h|, or its gate row."""
    shared_experts: int = 0
    """Experts of the neurons that are most often one of the 10 largest; they always run."""
    tokens: int = 4096
    """Calibration tokens."""


@dataclass(frozen=True)
class Attach:
    """A router on every FFN."""

    router: str = "sigmoid"
    router_options: dict[str, Any] = field(default_factory=dict)
    """What the kind of router takes, e.g. `hidden` of a norm router."""
    selector: dict[str, Any] = field(default_factory=lambda: {"kind": "threshold", "tau": 0.5})
    start: Literal["regression", "open"] = "regression"
    """Of sigmoid routers: ridge regression on the donor's own activations, or every expert on."""
    start_sparsity: float = 0.02
    """Share of experts off after the regression, in every layer."""
    when_off: Literal["zero", "mean"] = "zero"
    """What an expert that is off contributes: nothing, or its neurons' calibrated mean."""
    tokens: int = 16384
    """Calibration tokens."""


@dataclass(frozen=True)
class Fit:
    """Trains routers alone, one FFN after the other, on the donor's activations."""

    tokens: int = 65536
    """Calibration tokens; a tenth of them only measures."""
    epochs: int = 10
    """0: routers stay as they are and are only measured."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    batch_size: int = 512
    """Tokens, not blocks."""


@dataclass(frozen=True)
class Budget:
    """Sets every selector so that a stated share of the neurons is off on calibration text."""

    target_sparsity: float
    """Share of neurons off, over tokens and FFNs."""
    spend: Literal["uniform", "error"] = "uniform"
    """The same share in every FFN, or more where it costs less error of the FFN's output."""
    tokens: int = 8192
    """Calibration tokens."""


@dataclass(frozen=True)
class Stage:
    """A part of a train step, and the weight that a loss has at its end."""

    until: float
    """Where it ends, in any unit, e.g. thousands of steps: the last stage ends with the step."""
    weight: float
    curve: Literal["sine", "constant"] = "sine"
    """From the weight of the stage before along half a sine (ProSparse, arXiv 2402.13516), or the
    stage's own weight from its first step. The first stage is constant."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the host's linears (arXiv 2106.09685): W + alpha / rank * B A."""

    rank: int = 16
    alpha: int = 32


Weight = float | tuple[Stage, ...]
"""Of a loss: the same in every optimizer step, or led through stages."""


@dataclass(frozen=True)
class Train:
    """Gradient steps on token blocks."""

    tokens: int
    """Training tokens of this step; every step goes on where the last one stopped."""
    mode: Literal["dense", "soft", "straight", "hard"] = "dense"
    """How scores switch experts; see `moe_tools.experts.experts.Mode`."""
    losses: dict[str, Weight] = field(default_factory=lambda: {"lm": 1.0})
    """Name of a loss -> its weight, a number or stages. What `drive` turns starts from there."""
    target_sparsity: float | None = None
    """Share of neurons off, over tokens and FFNs, that this step has to reach; under the drives
    l1 and hoyer, of a dense model, the share that is exactly 0."""
    drive: Literal["shift", "eta", "l1", "hoyer"] = "shift"
    """What brings the sparsity there; see `moe_tools.training.controller`."""
    ramp: float = 0.6
    """Share of the steps in which the target is reached; 0: at once."""
    parts: Literal["all", "ffn", "routers"] = "all"
    """What is trained; `all` and `ffn` include routers, except in hard mode."""
    lora: Lora | None = None
    """Trains adapters of the linears among `parts` in place of their weights, and routers as ever;
    at the end they are merged: the folder stays a plain one."""
    lr: float = 1e-4
    """Peak learning rate of the host's weights, or of their adapters."""
    router_lr: float = 1e-3
    """Peak learning rate of the routers."""
    batch_size: int = 4
    """Blocks of one forward pass on one device."""
    accumulate: int = 1
    """Forward passes of one optimizer step."""
    checkpointing: bool = False
    """Computes each layer again in the backward pass: less memory, a forward pass more."""
    warmup: float = 0.06
    """Share of the optimizer steps."""
    checkpoint_every: int = 100
    """Optimizer steps, not micro-batches."""


Step = Swap | Split | Attach | Fit | Budget | Train
STEPS: dict[str, type[Step]] = {
    "swap": Swap,
    "split": Split,
    "attach": Attach,
    "fit": Fit,
    "budget": Budget,
    "train": Train,
}


def step_name(step: Step) -> str:
    """The verb of a step."""
    return next(name for name, kind in STEPS.items() if kind is type(step))
