"""A light install: what is missing is named with the extra that brings it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moe_tools.extras import needed

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

HEAVY = [
    "faiss",
    "pymetis",
    "scipy",
    "sklearn",
    "datasets",
    "gguf",
    "matplotlib",
    "bokeh",
    "pandas",
]
"""Modules that only an extra brings; jinja2 comes with torch."""

WITHOUT = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # an import of it fails
"""


def run_without(*modules: str, code: str) -> str:
    """What code prints in a Python that has not got some modules."""
    command = [sys.executable, "-c", WITHOUT + code, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_there_is_imported() -> None:
    assert needed("json.decoder", "all", "a test").JSONDecoder


def test_what_is_missing_is_named_with_its_extra() -> None:
    message = (
        "a plot needs no_such_thing, which is not installed: pip install 'moe-tools\\[plot\\]'"
    )
    with pytest.raises(ValueError, match=message):
        needed("no_such_thing.figure", "plot", "a plot")


def test_a_package_that_lacks_something_itself_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moe_tools_test_broken.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        needed("moe_tools_test_broken", "plot", "a plot")


def test_every_extra_that_an_error_names_exists() -> None:
    named = {
        line.split("moe-tools[")[1].split("]")[0]
        for folder in ("moe_tools", "cli", "kernels", "docs")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in {".py", ".md"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if "pip install" in line and "moe-tools[" in line
    }
    assert {"eval", "gpu", "peft"} <= named - {"{extra}"} <= set(EXTRAS)


def test_the_base_install_is_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(each).name for each in project["dependencies"]}
    with_torch = {"torch", "transformers", "accelerate", "safetensors", "numpy", "pyyaml", "tqdm"}
    assert names == with_torch | {"psutil", "rich"}


def test_a_split_names_what_is_missing_before_it_calibrates() -> None:
    code = """
from moe_tools.steps.split import Split, split
from tests.families import build
try:
    split(build("llama"), Split(expert_size=8), None, 0)
except ValueError as error:
    print(error)
"""
    assert "a split by kmeans needs faiss" in run_without("faiss", code=code)


def test_without_extras_a_model_is_converted_and_read(tmp_path: Path) -> None:
    code = f"""
import torch
import moe_tools.runs.run, moe_tools.training, moe_tools.inspection.page, moe_tools.report.plot
from moe_tools import load
from moe_tools.checkpoint.saving import save
from moe_tools.steps.partition import kmeans_partition
from tests.checkpoint.test_loading import convert
save(convert(), {str(tmp_path / "model")!r})
load({str(tmp_path / "model")!r})
try:
    kmeans_partition(torch.randn(8, 4), 2, 0)
except ValueError as error:
    print(error)
"""
    assert (
        run_without(*HEAVY, code=code)
        .strip()
        .endswith("k-means needs faiss, which is not installed: pip install 'moe-tools[cluster]'")
    )
