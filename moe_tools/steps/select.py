"""Select: the prompt chooses the neurons that run after it. Changes no weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from transformers import PreTrainedModel

from moe_tools.experts.conversion import conversion_so_far, write_conversion
from moe_tools.hosts.ffn import find_ffns
from moe_tools.inference.prompt import check_selects
from moe_tools.steps.rules import require
from moe_tools.steps.step import Option, Step, Work


@dataclass(frozen=True)
class Select(Step):
    """What is generated after a prompt runs the neurons that mattered there; the last step."""

    verb = "select"
    changes_function = True
    tokens = 0  # no field: it reads no text

    by: Literal["prompt"] = "prompt"
    """What chooses: the prompt, once for all that follows it (GRIFFIN, arXiv 2404.01365)."""
    share: float = 0.5
    """Of the neurons of every FFN that go on after the prompt; `--target-sparsity` is 1 - share."""

    def check(self) -> None:
        """A share above 0 and at most 1."""
        require(0 < self.share <= 1, self, "share", self.share, "above 0 and at most 1")

    def takes(self, option: Option) -> bool:
        """Only the sparsity."""
        return option == "target_sparsity"

    def changed(self, option: Option, value: Any) -> Self:
        """A target sparsity is the share that does not go on."""
        require(0 <= value < 1, self, option, value, "in [0, 1)")
        return replace(self, share=1 - value)

    def needs_text(self) -> bool:
        """It reads none."""
        return False

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Does all of it."""
        select(model, self.share, donor)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Writes the share into the model's config; measures nothing."""
        select(model, self.share, work.donor)
        return {}


def select(model: PreTrainedModel, share: float, donor: str) -> None:
    """Lets the config of a dense model say that its prompts select; what loads it then does so.

    Raises:
        ValueError: as `select_by_prompt`, or a model that selects already.
    """
    check_selects(model, share)
    find_ffns(model)
    write_conversion(model, replace(conversion_so_far(model, donor), prompt_share=share))
