"""Released versions of two other packages that do not work with each other.

A test that needs both is skipped where they meet, with the versions as the reason:

    NO_ADAPTERS = adapters_inside_a_model()

    @pytest.mark.skipif(NO_ADAPTERS != "", reason=NO_ADAPTERS)
"""

from importlib import metadata

from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


def adapters_inside_a_model() -> str:
    """Why transformers itself cannot load PEFT's adapters into a model; empty: it can.

    transformers 5.24 wants PEFT 0.22, and came out before it.
    """
    peft, transformers = metadata.version("peft"), metadata.version("transformers")
    if Version(peft) >= Version(MIN_PEFT_VERSION):
        return ""
    return (
        f"transformers {transformers} keeps adapters inside a model with PEFT {MIN_PEFT_VERSION} "
        f"and later only, not {peft}"
    )
