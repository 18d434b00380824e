"""The card of an exported folder: what it is, how near it is to ours, how to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from moe_tools.checkpoint.card import is_hub_id, public_name
from moe_tools.export.check import Figures
from moe_tools.export.source import Source
from moe_tools.names import README

RUN = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID")
```

```
vllm serve PATH_OR_HUB_ID
```"""


def write_export_card(
    source: Source, facts: dict[str, Any], figures: Figures | None, place: Path
) -> None:
    """Writes `README.md` of a folder that a stock class loads."""
    donor = source.name if source.conversion is None else source.conversion.donor
    data = ModelCardData(
        library_name="transformers",
        base_model=donor if is_hub_id(donor) else None,
        pipeline_tag="text-generation",
        tags=["moe-tools"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {public_name(donor)}, converted and exported by moe-tools",
        "A stock folder. It needs no moe-tools.",
        _table(("what", "value"), facts),
        f"## How to run it\n\n{RUN}",
    ]
    if figures is not None:
        parts += ["## Beside the converted model", *_compared(figures)]
    ModelCard("\n\n".join(parts) + "\n").save(place / README)


def _compared(figures: Figures) -> list[str]:
    if figures.sets_equal is None:
        said = f"Its logits are {figures.error:.2g} of their norm from the converted model's."
    else:
        said = (
            f"On the inputs of the converted model's FFNs, its own choose the same experts in "
            f"{figures.sets_equal:.2%} of {figures.token_layers:,} token-layers; there, their "
            f"outputs are {figures.error:.2g} of their norm apart."
        )
    if not figures.perplexity:
        return [said]
    rows = {name: f"{value:.4f}" for name, value in figures.perplexity.items()}
    return [said, _table((f"perplexity of {figures.tokens:,} tokens", ""), rows)]


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])
