"""The linker never picks between copies of a function that were made for different CPUs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kernels.compiler import ROOT, compile_objects

SOURCES = sorted((ROOT / "kernels" / "csrc").glob("isa_*.cpp"))


def mergeable_symbols(binary: Path) -> set[str]:
    """Symbols of which the linker keeps one copy, whoever defines them: weak or unique ones."""
    listed = subprocess.run(
        ["nm", "--defined-only", "--demangle", "--format=posix", str(binary)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = set()
    for line in listed.splitlines():
        name, kind, *_ = line.rsplit(maxsplit=3)
        pointer = name.startswith("DW.ref.")  # to the one personality routine: no code
        names |= {name} if kind in "WVu" and not pointer else set()
    return names


@pytest.mark.slow
def test_code_for_one_instruction_set_has_no_symbol_that_others_could_be_given(
    tmp_path: Path,
) -> None:
    """Else the linker could keep the copy for AVX-512 and let an older CPU run it.

    Without optimisation, every function that is not inlined for sure shows.
    """
    objects = compile_objects(SOURCES, tmp_path, ["-O0"])
    assert len(objects) == len(SOURCES) >= 6
    found = {made.name: names for made in objects if (names := mergeable_symbols(made))}
    assert found == {}
