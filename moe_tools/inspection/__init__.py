"""Shows every decision of the routers.

    inspect(model_or_folder, text)      an `Inspection`: tables of tokens, FFNs, experts
    inspecting(model)                   an `Inspection` of whatever runs meanwhile, e.g. `generate`
    overlap(inspection, other)          two texts, or two checkpoints
    effect(model, tokenizer, text, off={3: [17]})   what breaks
    page.write_page(inspection, "report.html", title="...")   one page that needs nothing else

`moe_tools.intervene` forces experts on or off. Rows are documented in `records`.
"""

from moe_tools.inspection.compare import effect, overlap
from moe_tools.inspection.inspection import Inspection
from moe_tools.inspection.run import inspect, inspecting
from moe_tools.inspection.table import Table

__all__ = ["Inspection", "Table", "effect", "inspect", "inspecting", "overlap"]
