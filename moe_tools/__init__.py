"""moe-tools: dense language models into models that compute only what a token needs.

These are all public names; each is imported on first use. `import moe_tools` does one thing: from
then on transformers loads a converted folder as the routed model it is (`moe_tools.checkpoint.auto`
says how and why; `unpatch_transformers` takes it back). A torch or transformers that is too old is
refused here, in one line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_tools.checkpoint.auto import patch_transformers, unpatch_transformers
from moe_tools.versions import check_versions

if TYPE_CHECKING:
    from moe_tools.checkpoint.loading import load
    from moe_tools.checkpoint.saving import save
    from moe_tools.experts.intervene import intervene
    from moe_tools.experts.routing import record_routing
    from moe_tools.inference.optimized import optimize
    from moe_tools.inference.prompt import select_by_prompt
    from moe_tools.inspection import inspect
    from moe_tools.measure.evaluate import evaluate
    from moe_tools.recipe import Recipe, read_recipe
    from moe_tools.runs.run import convert, run

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "convert",
    "evaluate",
    "inspect",
    "intervene",
    "load",
    "optimize",
    "patch_transformers",
    "read_recipe",
    "record_routing",
    "run",
    "save",
    "select_by_prompt",
    "unpatch_transformers",
]

_HOME = {
    "Recipe": "moe_tools.recipe",
    "convert": "moe_tools.runs.run",
    "evaluate": "moe_tools.measure.evaluate",
    "inspect": "moe_tools.inspection",
    "intervene": "moe_tools.experts.intervene",
    "load": "moe_tools.checkpoint.loading",
    "optimize": "moe_tools.inference.optimized",
    "read_recipe": "moe_tools.recipe",
    "record_routing": "moe_tools.experts.routing",
    "run": "moe_tools.runs.run",
    "save": "moe_tools.checkpoint.saving",
    "select_by_prompt": "moe_tools.inference.prompt",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_tools' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


check_versions()
patch_transformers()
