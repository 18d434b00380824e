"""Whether texts that share a row are kept apart: no token of one sees a token of another.

transformers makes the mask from the positions, which begin again with every text. Not every model
does: some ignore positions, some carry a state from token to token, remote code does what it wants.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from moe_tools.data.generate import evaluating
from moe_tools.data.limits import continues_text, text_config
from moe_tools.data.rows import Packing

TOKENS = 8
"""Of each of the two texts of the proof."""
SHARE = 0.05
"""Of the change that the other text makes where it is seen, what may be left: rounding."""
WAY_OUT = "use packing: padded or joined"


def check_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Whether a model, maybe without weights, can be given texts in this way.

    Raises:
        ValueError: it takes no positions or no mask, or continues no text.
    """
    name = type(model).__name__
    needs = {"isolated": "position_ids", "padded": "attention_mask"}.get(packing)
    if needs is None:
        return
    if not continues_text(model):
        raise ValueError(f"packing: {packing} is of causal language models, and {name} is none")
    if needs not in inspect.signature(model.forward).parameters:
        other = "padded" if packing == "isolated" else "joined"
        raise ValueError(f"{name} takes no {needs}: use packing: {other}")


@torch.no_grad()
def prove_isolation(model: PreTrainedModel) -> None:
    """Runs a text alone, behind another one in its row, and behind one that it is to see.

    Raises:
        ValueError: the text behind another one gives other logits than alone.
    """
    vocabulary = text_config(model).vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(vocabulary, (1, TOKENS), generator=generator).to(model.device)
        for _ in range(2)
    )
    positions_T = torch.arange(TOKENS, device=model.device)[None]
    both, apart = torch.cat([first, second], 1), torch.cat([positions_T, positions_T], 1)
    with evaluating(model):
        alone_TV, behind_TV, seen_TV = (
            model(input_ids=ids, position_ids=positions, use_cache=False)
            .logits[0, -TOKENS:]
            .float()
            for ids, positions in (
                (second, positions_T),
                (both, apart),
                (both, torch.arange(2 * TOKENS, device=model.device)[None]),
            )
        )
    left, change = ((alone_TV.float() - it_TV).abs().max() for it_TV in (behind_TV, seen_TV))
    if not left <= SHARE * change:
        raise ValueError(
            f"{type(model).__name__} does not keep texts apart that share a row (a text in front "
            f"changes the logits by up to {left:.3g}, by {change:.3g} where it is to be seen): "
            f"{WAY_OUT}"
        )
