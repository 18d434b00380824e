"""Proves that moe-tools computes an FFN as its host does, before anything is changed.

While the host runs, the outputs of gate and up are replaced by random numbers, and what then enters
the down projection is compared with our formula of the same numbers. Their standard deviation is
5: limits at 7 or 10 would not show on one text, and be a wrong model on another. A holder that is
replaced whole has to hand its x to gate and up, and to return what comes out of the down
projection, as they are.

An FFN that its host computes in another way, but neuron by neuron, is masked (`Layout.masked`):
shuffled neurons have to give shuffled activations.

Letters: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_tools.data.generate import evaluating
from moe_tools.data.limits import text_config
from moe_tools.hosts.fused import fused_experts
from moe_tools.hosts.graph_rows import everywhere, place_of, stock_twin
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.linears import device_of, dtype_of, widths
from moe_tools.hosts.moe_host import take_apart
from moe_tools.hosts.projections import activation_of, hidden_TF
from moe_tools.hosts.rows import Rows, rows_of, settle_rows, settled
from moe_tools.hosts.shapes import part_of

_log = logging.getLogger(__name__)

TOKENS = 8
PROBE = 5.0
"""Standard deviation of what replaces the outputs of gate and up."""
NEAR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far two ways of one computation may differ, relative to the largest number."""


@torch.no_grad()
def settle(model: nn.Module, *, is_twin: bool = False) -> None:
    """Proves the FFNs of a dense model and keeps their layouts; nothing else changes.

    A model that is all shapes, on the meta device, stays unproven.

    Args:
        model: dense.
        is_twin: it stands for another model, and no twin can stand for it.

    Raises:
        ValueError: an FFN that is neither computed as its layout says nor neuron by neuron, or one
            that plain text does not reach.
    """
    if settled(model) or all(tensor.is_meta for tensor in model.parameters()):
        return
    for path, fused in fused_experts(model).items():
        take_apart(path, fused, prove=True)
    holders = [
        Holder(path, model.get_submodule(path), layout, seed)
        for seed, (path, layout) in enumerate(rows_of(model).items())
    ]
    try:
        proven = dict(_prove(model, _reached(model, holders)))
    except CannotRun as error:
        if is_twin:
            raise
        proven = _as_in_twin(model, holders, error)
    settle_rows(model, proven)


class CannotRun(ValueError):
    """A model that needs more than tokens, or a layer of one without its text."""


def _as_in_twin(model: nn.Module, holders: Sequence[Holder], error: CannotRun) -> Rows:
    """The rows that a shrunk twin was proven to have, where the model itself cannot be run."""
    twin = stock_twin(model)
    if twin is None:
        raise error
    settle(twin, is_twin=True)
    proven = everywhere(model, twin, rows_of(twin))
    if any(holder.path not in proven for holder in holders):
        raise error
    return {holder.path: proven[holder.path] for holder in holders}


def _reached(model: nn.Module, holders: Sequence[Holder]) -> list[Holder]:
    """The holders that plain text reaches: what sees pictures beside a language model stays dense.

    A few tokens do not reach every expert: of holders in the same place of their lists, one will
    do. Where the model does not run on tokens alone, nobody can tell, and all stay.
    """
    called: set[str] = set()
    with ExitStack() as stack:
        for holder in holders:
            linear = holder.part(holder.layout.up)
            note = partial(_note, called, place_of(holder.path))
            _enter(stack, linear.register_forward_pre_hook(note))
        try:
            with evaluating(model):
                model(**sample_inputs(model))
        except Exception:  # it needs more than tokens
            return list(holders)
    found = [holder for holder in holders if place_of(holder.path) in called]
    if dense := [holder.path for holder in holders if holder not in found]:
        _log.info("%d FFNs stay dense, plain text does not reach %s", len(dense), dense[0])
    if holders and not found:
        raise ValueError(f"plain text reaches no FFN of {type(model).__name__}")
    return found


def _note(called: set[str], place: str, *_: Any) -> None:
    called.add(place)


def _prove(model: nn.Module, holders: Sequence[Holder]) -> Iterator[tuple[str, Layout]]:
    observe(model, holders)
    holders = [_with_dropout(model, holder) for holder in holders]
    doubtful = {holder.path: why for holder in holders if (why := holder.difference())}
    others = [replace(holder, layout=holder.layout.as_masked()) for holder in holders]
    masked = [holder for holder in others if holder.path in doubtful]
    shuffled = [replace(holder, shuffled=True) for holder in masked]
    observe(model, masked)
    observe(model, shuffled)
    for before, after in zip(masked, shuffled, strict=True):
        if why := before.coupling(after):
            raise ValueError(
                f"{before.path} ({type(before.module).__name__}) cannot be converted: "
                f"{doubtful[before.path]}, and {why}"
            )
    for holder in holders:
        is_masked = holder.path in doubtful
        yield holder.path, holder.layout.as_masked() if is_masked else holder.layout


def _with_dropout(model: nn.Module, holder: Holder) -> Holder:
    """The holder with the dropout that makes its row right, where one of its own does."""
    if holder.layout.slot or not holder.difference():
        return holder
    names = [name for name, child in holder.module.named_children() if type(child) is nn.Dropout]
    for place in ("hidden_dropout", "output_dropout"):
        for name in names:
            row: dict[str, Any] = {place: name}
            other = replace(holder, layout=replace(holder.layout, **row))
            observe(model, [other])
            if not other.difference():
                return other
    return holder


@dataclass
class Holder:
    """A host module with its layout, and what one pass of the host shows of it."""

    path: str
    module: nn.Module
    layout: Layout
    seed: int
    """Of the numbers that replace the outputs of gate and up."""
    shuffled: bool = False
    """The neurons of these numbers are in another order, `order_F`."""

    def __post_init__(self) -> None:
        self.x_TD: Tensor | None = None
        """What the holder was given, where it was called alone."""
        self.y_TD: Any = None
        """What it returned then."""
        self.entering: dict[str, Tensor] = {}
        """What entered gate and up."""
        self.rows: dict[str, Tensor] = {}
        """Numbers that replaced gate and up rows, (..., F)."""
        self.h_TF: Tensor | None = None
        self.out_TD: Tensor | None = None
        """What came out of the down projection."""

    @property
    def is_whole(self) -> bool:
        """Whether the holder itself is what would be replaced."""
        return not self.layout.slot

    def part(self, path: str) -> nn.Module:
        """One part, by its path in the layout."""
        return part_of(self.module, path)

    def difference(self) -> str:
        """What the host does otherwise than our formula; empty: nothing."""
        if self.layout.masked:
            return "what stands between its linears is no activation that moe-tools knows"
        if self.h_TF is None:
            return "it computes without calling its linears"
        expected_TF = hidden_TF(
            activation_of(self.layout, self.part), self.rows["up"], self.rows.get("gate")
        )
        if error := relative_error(self.h_TF, expected_TF):
            return f"its hidden activations differ from our formula by {error:.2g} of the largest"
        if self.is_whole:
            for name, x_TD in self.entering.items():
                if not _same(x_TD, self.x_TD):
                    return f"its {name} projection does not get the x that it is given"
            if not _same(self.y_TD, self.out_TD):
                return "it does more with what comes out of the down projection"
        return ""

    def coupling(self, shuffled: Holder) -> str:
        """Why not even a mask is exact: neurons that need one another; empty: it is."""
        if self.h_TF is None or shuffled.h_TF is None:
            return "it cannot be looked at"
        x_TD = self.entering["up"]
        if x_TD.shape[:-1] != self.h_TF.shape[:-1]:
            return "what enters its linears is not token by token"
        order_F = _order_F(self.h_TF.shape[-1])
        error = relative_error(shuffled.h_TF, self.h_TF[..., order_F])
        return f"its neurons are coupled: shuffled, they differ by {error:.2g}" if error else ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts, gate and up give random numbers, and what the host makes of them is kept.

        The holder is in training mode, and of its modules every dropout: one between gate and up
        and the down projection shows as a difference, unless the layout knows it. Under a mask it
        may be there.
        """
        down = self.part(self.layout.down)
        training = self.module.training
        with ExitStack() as stack:
            for name, path in (("up", self.layout.up), ("gate", self.layout.gate)):
                if path is not None and (name == "up" or path != self.layout.up):
                    linear = self.part(path)
                    _enter(stack, linear.register_forward_pre_hook(self._see(name)))
                    _enter(stack, linear.register_forward_hook(self._replace(name)))
            _enter(stack, down.register_forward_pre_hook(self._see_h))
            _enter(stack, down.register_forward_hook(self._see_out))
            stack.callback(setattr, self.module, "training", training)
            self.module.training = not self.layout.masked
            if not self.layout.masked:
                self._drop(stack)
            for path in (self.layout.hidden_dropout, self.layout.output_dropout):
                if path is not None and isinstance(getattr(self.module, path, None), float):
                    stack.callback(setattr, self.module, path, getattr(self.module, path))
                    setattr(self.module, path, 0.0)
            yield

    def _drop(self, stack: ExitStack) -> None:
        """Lets every dropout that the layout does not name drop half."""
        paths = (self.layout.hidden_dropout, self.layout.output_dropout)
        named = [self.part(path) for path in paths if path is not None]
        for module in self.module.modules():
            if type(module) is nn.Dropout and module not in named:
                stack.callback(setattr, module, "p", module.p)
                stack.callback(setattr, module, "training", module.training)
                module.p, module.training = 0.5, True

    def call(self) -> None:
        """Gives the holder a random x, as nothing but its own parts is needed."""
        up = self.part(self.layout.up)
        dtype = dtype_of(up) or torch.float32
        x_TD = self._random("x", (1, TOKENS, _width(up))).to(device_of(up), dtype)
        self.x_TD = x_TD
        self.y_TD = self.module(x_TD.clone())

    def _see(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.entering[name] = args[0].clone()

        return see

    def _replace(self, name: str) -> Callable[..., Tensor]:
        def put(_: nn.Module, __: Any, out_TF: Tensor) -> Tensor:
            fused = self.layout.gate == self.layout.up
            neurons = out_TF.shape[-1] // (2 if fused else 1)
            for row in ("gate", "up") if fused else (name,):
                # At least fp32, whatever the weights are in: a small difference shows.
                dtype = torch.promote_types(out_TF.dtype, torch.float32)
                rows_TF = self._random(row, (*out_TF.shape[:-1], neurons)).to(out_TF.device, dtype)
                order_F = _order_F(neurons)
                self.rows[row] = rows_TF[..., order_F] if self.shuffled else rows_TF
            if not fused:
                return self.rows[name].clone()
            pair = self.rows["gate"], self.rows["up"]
            if self.layout.interleaved:
                return torch.stack(pair, dim=-1).flatten(-2)
            return torch.cat(pair, dim=-1)

        return put

    def _see_h(self, down: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h_TF, *rest = args
        self.h_TF = h_TF.clone()
        return (h_TF.to(dtype_of(down) or self.entering["up"].dtype), *rest)

    def _see_out(self, _: nn.Module, __: Any, out_TD: Tensor) -> None:
        self.out_TD = out_TD.clone()

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same numbers for the same shape, whenever they are asked for."""
        generator = torch.Generator().manual_seed(3 * self.seed + ("x", "gate", "up").index(name))
        return torch.randn(shape, generator=generator) * (1.0 if name == "x" else PROBE)


@runtime_checkable
class HasSample(Protocol):
    """A part of a model, which says itself what it can be run on."""

    def sample_inputs(self) -> dict[str, Tensor]:
        """The arguments of its forward pass."""
        ...


def observe(model: nn.Module, holders: Sequence[Holder]) -> None:
    """Calls each holder that can be called alone, and runs the model once for the others."""
    with evaluating(model), torch.random.fork_rng(devices=[]):
        rest = [holder for holder in holders if not _called_alone(holder)]
        if rest:
            _run(model, rest)


def _called_alone(holder: Holder) -> bool:
    if not holder.is_whole:
        return False
    try:
        with holder.watched():
            holder.call()
    except Exception:  # whatever it lacks: the model will give it that
        holder.x_TD = holder.y_TD = None
        return False
    return True


def _run(model: nn.Module, holders: Sequence[Holder]) -> None:
    """Runs the model on a few tokens.

    Raises:
        CannotRun: it needs more than tokens.
    """
    try:
        with ExitStack() as stack:
            for holder in holders:
                stack.enter_context(holder.watched())
            model(**sample_inputs(model))
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise CannotRun(
            f"{type(model).__name__} does not run on plain tokens, so its FFNs cannot be checked: "
            f"{first}"
        ) from error


def sample_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A few tokens for a model, from the middle of its vocabulary: special ones are at its ends."""
    if isinstance(model, HasSample):
        return model.sample_inputs()
    config = text_config(model)
    vocabulary = int(config.vocab_size)
    ids = torch.arange(TOKENS) * max(1, vocabulary // (3 * TOKENS)) + vocabulary // 4
    rows = getattr(config, "num_codebooks", 1)  # sound: a row each
    device = next(model.parameters()).device
    return model_inputs(model, (ids % vocabulary).expand(rows, -1).to(device))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number, 0 where it is rounding; inf: other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    near = max(NEAR.get(tensor.dtype, 1e-5) for tensor in (found, expected))
    largest = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((found.float() - expected.float()).abs().max() / largest)
    return 0.0 if error <= near else error


def _same(found: Any, expected: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, in whatever shape."""
    if not isinstance(found, Tensor) or expected is None or found.numel() != expected.numel():
        return False
    return torch.equal(found.flatten(), expected.flatten().to(found.dtype))


def _order_F(neurons: int) -> Tensor:
    """An order of the neurons that is not their own."""
    return torch.randperm(neurons, generator=torch.Generator().manual_seed(neurons))


def _width(linear: nn.Module) -> int:
    found = widths(linear)
    assert found is not None
    return found[0]


def _enter(stack: ExitStack, handle: RemovableHandle) -> None:
    stack.callback(handle.remove)
