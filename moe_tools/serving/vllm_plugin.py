"""What vLLM calls when it starts, by the entry point `vllm.general_plugins`.

vLLM chooses its code by `architectures` in `config.json`, and has no code by the names that our
folders have there (`moe_tools.checkpoint.class_names`). Here they get some: `vllm_model`, imported
when a folder is served. A vLLM without this plugin refuses the folder by its name.

moe-tools is imported in vLLM's processes from here on, and so takes the prefix out of every config
that transformers reads. What vLLM itself reads therefore gets it back: a folder never runs as the
stock class of its host, also where an earlier moe-tools wrote that name into it.
"""

from __future__ import annotations

from typing import Any

from moe_tools.checkpoint.class_names import PREFIX, only_ours, stock_class

MODEL = "moe_tools.serving.vllm_model:MoeToolsForCausalLM"
PARSER = "hf"
"""What vLLM calls the format of a config in `config.json`."""


def register() -> None:
    """Makes converted folders known to vLLM; every process of vLLM calls it, perhaps twice."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    for name in sorted({"ForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}):
        ModelRegistry.register_model(PREFIX + name, MODEL)  # by its path: imported when it is used
    stock = type(get_config_parser(PARSER))
    if not getattr(stock, "names_converted", False):
        register_config_parser(PARSER)(_naming(stock))


def _naming(stock: Any) -> type:
    """A parser of configs that names our class where a config is one of ours."""

    class ConvertedConfigParser(stock):  # type: ignore[misc]
        """Reads `config.json` as vLLM does; `architectures` of a converted folder are ours."""

        names_converted = True

        def parse(self, *args: Any, **options: Any) -> Any:
            given, config = super().parse(*args, **options)
            name_ours(config)
            return given, config

    return ConvertedConfigParser


def name_ours(config: Any) -> None:
    """Puts our prefix into the `architectures` of a config that a stock class must not run.

    Selection by the prompt is among these here: vLLM would run the donor, and not what was asked
    for, while moe-tools stands beside it.
    """
    block = getattr(config, "moe_tools", None)
    if only_ours(block) or (block is not None and block.get("prompt_share") is not None):
        names = config.architectures or ["ForCausalLM"]
        config.architectures = [PREFIX + stock_class(name) for name in names]
