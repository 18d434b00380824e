"""What a card shows; with small shapes, the interpreter shows some of it, too.

Tensors here are made on the CPU and moved, as a user does it. Under a default device, as tests of
`either` have it, our own code could forget to name one.
"""

from __future__ import annotations

import pytest

from tests.kernels.triton.conftest import bf16_as_numbers  # noqa: F401  # a fixture


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: interpreted, or with -m gpu on the card."""
    return str(request.param)
