"""Packages that are too old are refused at the import, without importing them."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from moe_tools.checkpoint.auto import SUPPORTED
from moe_tools.versions import FLOORS, check_versions

ROOT = Path(__file__).parents[1]


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Lets packages be installed in other versions."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))


@pytest.mark.parametrize("found", ["2.9", "2.9.0a0+43c6f9c", "2.10.1", "2.13.0+cpu", "3.0"])
def test_a_torch_of_the_floor_or_above_is_fine(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=found)
    check_versions()


@pytest.mark.parametrize("found", ["5.6.2", "4.57.6", "5"])
def test_an_older_transformers_is_one_clear_line(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, transformers=found)
    with pytest.raises(ImportError) as caught:
        check_versions()
    assert str(caught.value) == (
        f"transformers {found} is installed, and moe-tools needs 5.7 or later: "
        "pip install 'transformers>=5.7'"
    )


def test_one_without_metadata_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    check_versions()


def test_the_import_refuses_it_before_torch_is_imported(tmp_path: Path) -> None:
    info = tmp_path / "torch-2.8.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
try:
    import moe_tools
except ImportError as error:
    print(error, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("torch 2.8.0 is installed, and moe-tools needs 2.9 or later")
    assert done.stdout.strip().endswith("False"), done.stderr


def test_every_file_names_the_same_lowest_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = (ROOT / "locks" / "lowest.in").read_text()
    docs = (ROOT / "docs" / "elsewhere.md").read_text()
    for name, floor in FLOORS.items():
        assert any(each.startswith(f"{name}>={floor},") for each in project["dependencies"])
        assert f"\n{name}=={floor}.0\n" in lowest
        assert f"| {name} | {floor} |" in docs
    assert f">={FLOORS['transformers']},<6" == SUPPORTED
