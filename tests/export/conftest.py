"""Where another program is, which is built outside this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.elsewhere import powerinfer


@pytest.fixture
def programs() -> Path:
    """The folder of PowerInfer's programs."""
    return powerinfer()
