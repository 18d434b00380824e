"""The arrows of CONTRIBUTING.md, enforced: who may import whom, and what stays light."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARROWS = (
    "registry names processes waiting freed_memory disk lock cached extras versions typed kernels "
    "< atomic < data < hosts < experts < thresholds inference measure < checkpoint < steps report "
    "< training inspection < recipe < runs export serving < bench < cli patched"
)
"""A folder imports from those left of its `<`, and not from its neighbours."""
RANKS = {layer: rank for rank, group in enumerate(ARROWS.split("<")) for layer in group.split()}
KERNEL_USERS = {"hosts", "experts", "inference", "bench", "measure", "steps"}
"""Folders that may import `kernels`: all others leave the arithmetic to them."""
WITHOUT_TORCH = [
    "moe_tools.registry",
    "moe_tools.recipe",
    "moe_tools.recipe.files",
    "moe_tools.report.report",
]
VERBS = {
    f"moe_tools.steps.{verb}" for verb in ("swap", "split", "attach", "fit", "budget", "refit")
}


def find_modules() -> dict[str, Path]:
    """Every module by its dotted name, the linked folders included."""
    found = {}
    for folder, _, files in os.walk(ROOT / "moe_tools", followlinks=True):
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


MODULES = find_modules()
# The package itself re-exports from every layer, lazily: it stands above the arrows.
LAYERED = [name for name in MODULES if name != "moe_tools"]


def layer(module: str) -> str:
    """moe_tools.hosts.ffn -> hosts; the package itself is its own layer."""
    return module.split(".")[1] if "." in module else module


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Every node; without `lazy`, only what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from statements(node, lazy)


def is_ours(module: str) -> bool:
    """Whether a dotted name is a module or folder of ours, rather than a name inside a module."""
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def read_imports(source: str, module: str, package: bool = False, lazy: bool = True) -> set[str]:
    """The dotted modules that `source`, standing at `module`, imports."""
    names = set()
    for node in statements(ast.parse(source), lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") + ["*"] * package
            base = ".".join([*parents[: -node.level or 0], *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if is_ours(name) else base for name in inner}
    return names


def imports_of(module: str) -> set[str]:
    """What a module imports, anywhere; in cli, where laziness is the design, at the top."""
    path = MODULES[module]
    source = path.read_text(encoding="utf-8")
    return read_imports(source, module, path.stem == "__init__", lazy=layer(module) != "cli")


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "moe_tools"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"moe_tools"}


def run_python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter at the root; its output."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import moe_tools.kernels", {"moe_tools.kernels"}),
        ("import torch.nn as nn", {"torch.nn"}),
        ("from moe_tools import kernels", {"moe_tools.kernels"}),
        ("from moe_tools import __version__", {"moe_tools"}),
        ("from moe_tools.registry import Registry", {"moe_tools.registry"}),
        ("from ..kernels import sparse_ffn", {"moe_tools.kernels.sparse_ffn"}),
        ("from .. import kernels, steps", {"moe_tools.kernels", "moe_tools.steps"}),
        ("def f():\n    import moe_tools.kernels", {"moe_tools.kernels"}),
        ("if TYPE_CHECKING:\n    from moe_tools import steps", {"moe_tools.steps"}),
    ],
)
def test_every_form_of_import_is_read(source: str, expected: set[str]) -> None:
    assert read_imports(source, "moe_tools.experts.experts") == expected


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert read_imports("from . import x", "moe_tools.data", package=True) == {"moe_tools.data"}


def test_lazy_imports_can_be_left_out() -> None:
    source = "import ast\ndef f():\n    import torch"
    assert read_imports(source, "moe_tools.cli.main", lazy=False) == {"ast"}


@pytest.mark.parametrize("module", LAYERED)
def test_imports_follow_the_arrows(module: str) -> None:
    own = layer(module)
    assert own in RANKS, f"{module} belongs to no layer: add its folder to ARROWS"
    allowed = {own} | {name for name, rank in RANKS.items() if rank < RANKS[own]}
    wrong = {name for name in ours(imports_of(module)) if layer(name) not in allowed}
    assert not wrong, f"{module} may import {sorted(allowed)}, not {sorted(wrong)}"


@pytest.mark.parametrize("module", LAYERED)
def test_kernels_are_imported_in_few_folders(module: str) -> None:
    users = {name for name in ours(imports_of(module)) if layer(name) == "kernels"}
    assert not users or layer(module) in KERNEL_USERS | {"kernels"}, f"{module} imports {users}"


@pytest.mark.parametrize("module", [name for name in LAYERED if layer(name) == "kernels"])
def test_kernels_know_no_model_library(module: str) -> None:
    assert "transformers" not in third_party(imports_of(module))


@pytest.mark.parametrize("module", sorted(VERBS & set(LAYERED)))
def test_verbs_do_not_import_each_other(module: str) -> None:
    assert not imports_of(module) & (VERBS - {module})


@pytest.mark.parametrize("module", [name for name in WITHOUT_TORCH if name in MODULES])
def test_light_modules_name_no_torch(module: str) -> None:
    assert not third_party(imports_of(module)) & {"torch", "transformers"}


@pytest.mark.parametrize(
    "module",
    [name for name in ["moe_tools", "moe_tools.cli.main", *WITHOUT_TORCH] if name in MODULES],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    assert not {"torch", "transformers"} & set(run_python(code, module).split())


@pytest.mark.parametrize("folder", ["kernels", "cli", "recipes"])
def test_linked_folders_stay_links_without_an_init(folder: str) -> None:
    link = ROOT / "moe_tools" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    # With one, `import kernels` inside transformers would find ours while we stand at the root.
    assert not (ROOT / folder / "__init__.py").exists()


def test_help_is_instant() -> None:
    code = """
import sys
from moe_tools.cli.main import main
sys.argv = ["moe-tools", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    seconds = []
    for _ in range(3):  # the best of three: a busy machine is not a slow program
        start = time.perf_counter()
        assert "moe-tools" in run_python(code)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
