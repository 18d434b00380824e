"""What gets installed is the package, whole, and no name beside it."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {".py", ".pyi", ".yaml", ".json", ".typed"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files are ours"),
]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, into: Path, *kinds: str, **env: str) -> None:
    python_build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*python_build, *kinds, "--outdir", into, tree, cwd=into.parent, **env)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout, links kept: a build writes into its source tree."""
    copy = tmp_path_factory.mktemp("tree")
    listed = run("git", "ls-files", "-z", "-c", "-o", "--exclude-standard", cwd=ROOT)
    for name in set(filter(None, listed.split("\0"))):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist, both built from the checkout."""
    folder = tmp_path_factory.mktemp("built") / "dist"
    build(tree, folder, "--sdist", "--wheel")
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_installs_one_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    (info,) = tops - {"moe_tools"}
    assert info.startswith("moe_tools-")
    assert info.endswith(".dist-info")


def test_wheel_holds_every_file_behind_the_links(wheel: Path, tree: Path) -> None:
    walked = os.walk(tree / "moe_tools", followlinks=True)
    paths = [Path(folder, file) for folder, _, files in walked for file in files]
    sources = [path for path in paths if path.suffix in SHIPPED]
    assert {"kernels", "recipes", "cli"} <= {path.name for path in (tree / "moe_tools").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        for path in sources:
            entry = archive.getinfo(path.relative_to(tree).as_posix())
            assert not stat.S_ISLNK(entry.external_attr >> 16), entry.filename
            assert archive.read(entry) == path.read_bytes(), entry.filename


def native_in(wheel: Path) -> list[str]:
    """The compiled files, and any source of them."""
    return [name for name in names_in(wheel) if Path(name).suffix in {".so", ".pyd", ".cpp", ".h"}]


def run_installed(wheel: Path, code: str, folder: Path) -> str:
    """What `code` prints where only the wheel, and what it depends on, is installed."""
    site, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", site, wheel, cwd=elsewhere)
    return run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site)).strip()


def test_installed_wheel_imports_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    code = "import moe_tools.kernels.sparse_ffn as it; print(it.__file__)"
    printed = run_installed(wheel, code, tmp_path)
    assert Path(printed) == tmp_path / "site" / "moe_tools" / "kernels" / "sparse_ffn.py"


def test_wheel_holds_the_native_kernels_compiled(wheel: Path, tmp_path: Path) -> None:
    (name,) = native_in(wheel)
    assert name.startswith("moe_tools/kernels/cpu/_sparse_ffn.")
    code = "from moe_tools.kernels.sparse_ffn import backends; print(*backends())"
    assert run_installed(wheel, code, tmp_path) == "cpu reference"


def test_without_a_compiler_a_wheel_still_builds_and_runs(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("build", "*.so"))
    build(copy, tmp_path / "plain", "--wheel", CC="false", CXX="false")
    (plain,) = (tmp_path / "plain").glob("*.whl")
    assert native_in(plain) == []
    code = "from moe_tools.kernels.sparse_ffn import backends; print(*backends())"
    assert run_installed(plain, code, tmp_path) == "reference"


def test_sdist_builds_the_same_wheel(dist: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    build(tree, tmp_path / "again", "--wheel")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert names_in(again) == names_in(wheel)
