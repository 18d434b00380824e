"""Samples training text from the donor itself: data-free distillation.

Shapes: B blocks, T tokens a block (`length`), V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_tools.data.holdout import digest
from moe_tools.data.limits import check_length, continues_text, text_config
from moe_tools.data.packing import blocks_for, check_size
from moe_tools.data.progress import progress
from moe_tools.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")
"""What a KV cache is called: by transformers 5.24 and later, and by those before it."""


def generate_blocks(
    model: "PreTrainedModel",
    *,
    length: int,
    tokens: int,
    seed: int,
    batch_size: int = 16,
    temperature: float = 1.0,
) -> Tensor:
    """Blocks that the model samples itself, each from BOS on, past any EOS to the full length.

    The plain distribution is sampled: no top-k, top-p or penalty of the model's generation config,
    since a student should learn what the donor says, not a polished version of it.

    Args:
        model: a causal language model; its BOS (else EOS) token is the first of every block.
        length: tokens a block, BOS included.
        tokens: how many are wanted, rounded up to whole blocks.
        seed: block i depends on the seed and i alone, so a larger budget appends blocks (up to
            the rounding of matmuls at another batch size).
        batch_size: blocks sampled together.
        temperature: divides the logits.

    Returns:
        blocks_BT, int64, on the CPU.

    Raises:
        ValueError: the model is no causal language model or has neither BOS nor EOS, the length
            exceeds its context, or a size or the temperature is not positive.
    """
    count = blocks_for(tokens, length)
    check_size("batch_size", batch_size)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be positive: use 1.0")
    check_samples(model, length)
    first = _first_token(model)
    rows: list[Tensor] = []
    with evaluating(model), progress("sampling", count * length, "token") as bar:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            uniform_BT = torch.stack([_uniform_T(seed, number, length) for number in numbers])
            rows.append(_sample(model, first, uniform_BT, temperature, bar))
    return torch.cat(rows)


def check_samples(model: "PreTrainedModel", length: int) -> None:
    """Refuse a model that cannot sample blocks of this length.

    Raises:
        ValueError: as `generate_blocks`; the model's weights do not matter.
    """
    kind = type(model).__name__
    if not continues_text(model):
        raise ValueError(
            f"{kind} is no causal language model and cannot sample its own data: use 'docs'"
        )
    check_length(model, length)
    _first_token(model)


def _first_token(model: "PreTrainedModel") -> int:
    """BOS; models without one saw EOS before every document."""
    config = text_config(model)
    for token in (config.bos_token_id, config.eos_token_id):
        if isinstance(token, list) and token:
            token = token[0]
        if isinstance(token, int):
            return token
    raise ValueError(
        f"{type(model).__name__} has neither a BOS nor an EOS token to start from: "
        "set model.config.bos_token_id"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off while it lasts; afterwards every module is as it was.

    On a CPU the memory of one pass is kept for the next.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    first = next(model.parameters(), None)
    try:
        with keep_freed_memory("cpu" if first is None else first.device.type):
            yield
    finally:
        for module, training in before:
            module.training = training


def cache_name(model: nn.Module) -> str:
    """What the model's forward pass and its output call the KV cache: one of `CACHE_NAMES`."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in known)


def _uniform_T(seed: int, number: int, length: int) -> Tensor:
    """The random numbers of one block, the same whatever batch it is in."""
    # Hashed, since seed + number would give seed 1 the second block of seed 0.
    generator = torch.Generator().manual_seed(digest(f"{seed}:{number}"))
    return torch.rand(length, dtype=torch.float64, generator=generator)


# Not inference_mode: its tensors could not be used in training.
@torch.no_grad()
def _sample(
    model: "PreTrainedModel", first: int, uniform_BT: Tensor, temperature: float, bar: "tqdm"
) -> Tensor:
    """One batch of blocks_BT, token by token with the model's own cache."""
    batch, length = uniform_BT.shape
    token_B = torch.full((batch,), first)
    columns, cache, name = [token_B], None, cache_name(model)
    bar.update(batch)
    for position in range(1, length):
        ids_B1 = token_B[:, None].to(model.device)
        output = model(input_ids=ids_B1, use_cache=True, **{name: cache})
        cache = output[name]
        token_B = _draw(output.logits[:, -1].cpu() / temperature, uniform_BT[:, position])
        columns.append(token_B)
        bar.update(batch)
    return torch.stack(columns, dim=1)


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert the cumulative distribution: one uniform number, one token."""
    # In float64: float32 loses the tail of a large vocabulary in the running sum. On the CPU: not
    # every accelerator has float64.
    cumulative_BV = torch.softmax(logits_BV.double(), dim=-1).cumsum(dim=-1)
    point_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    token_B1 = torch.searchsorted(cumulative_BV, point_B1, right=True)
    return token_B1.clamp(max=logits_BV.shape[-1] - 1).squeeze(1)
