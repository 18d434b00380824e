"""A disk that refuses, in one line; the refusals are real ones, of the kernel."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_tools.atomic import new_file
from moe_tools.disk import CannotWrite, cannot_write, writing

TENSORS = {"a": torch.zeros(50_000)}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than 64 KiB, as under `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda file: file.write_bytes(bytes(100_000)),
    "safetensors": lambda file: save_file(TENSORS, file),
    "torch": lambda file: torch.save(TENSORS, file),
    "torch, opened": lambda file: torch.save(TENSORS, file.open("wb")),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_s_refusal_is_one(writer: str, small_files: None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(CannotWrite) as said, new_file(file) as partial:
        WRITERS[writer](partial)
    line = str(said.value)
    if writer == "torch":  # does not say why
        assert line.startswith(f"{file} cannot be written: PyTorch could not write it (")
    else:
        assert line.startswith(f"{file} cannot be written: File too large (")
    assert " GiB are free): " in line and "\n" not in line
    assert line.endswith(" and repeat the command; what was complete is kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"No space left on device \([0-9.]+ GiB are free\): make room and"),
        (errno.EDQUOT, "Disk quota exceeded .*: make room and"),
        (errno.EIO, "Input/output error .*: see to the disk and"),
        (errno.EROFS, "Read-only file system .*: choose a place"),
    ],
)
def test_the_way_out_is_said(code: int, words: str, tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    with pytest.raises(CannotWrite, match=f"^{place} cannot be written: {words}"), writing(place):
        raise OSError(code, os.strerror(code))


def test_the_nearest_place_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(CannotWrite, match=f"^{tmp_path / 'step'} cannot"),
        writing(tmp_path),
        writing(tmp_path / "step"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_the_error_names_is_its_place() -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/proc/mine")
    assert str(cannot_write(error)).startswith("/proc/mine cannot be written: ")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "no such file"),
        RuntimeError("shapes differ"),
        ValueError("x is no safetensors file: Input/output error (os error 5)"),  # it says all
    ],
)
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error
