"""The tools use the package; an install, which has no tools, must not notice."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*(from|import) tools\b", re.MULTILINE)


def test_the_package_imports_no_tool() -> None:
    walked = os.walk(ROOT / "moe_tools", followlinks=True)
    sources = [Path(folder, name) for folder, _, names in walked for name in names]
    found = [path for path in sources if path.suffix == ".py" and IMPORT.search(path.read_text())]
    assert len(sources) > 100
    assert not found
