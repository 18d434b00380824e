"""One writer for a folder or a file: who is let in, who is refused, what stays behind."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_tools.atomic import new_file, new_folder, partial_of
from moe_tools.lock import LOCK, held, locked

ROOT = Path(__file__).parents[2]
HOLDING = """
import sys
from pathlib import Path
from moe_tools import atomic, lock
with getattr(atomic if sys.argv[1].startswith("new") else lock, sys.argv[1])(Path(sys.argv[2])):
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a path until its input ends."""
    command = [sys.executable, "-c", HOLDING, what, str(path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        yield process
    finally:
        process.communicate("")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- a folder


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder("held", out) as other:
        with pytest.raises(ValueError) as said, held(out):
            pass
        assert str(said.value).startswith(
            f"{out} is being written by process {other.pid} on {socket.gethostname()}, since 20"
        )
        assert str(said.value).endswith(": wait for its end, or choose another --output")
        assert names(tmp_path) == {"out", f"out/{LOCK}"}  # the lock of the first is still there
    with held(out):
        (out / "mine").touch()
    assert names(tmp_path) == {"out", "out/mine"}


def test_the_same_process_is_another_writer_too(tmp_path: Path) -> None:
    with (
        held(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        held(tmp_path),
    ):
        pass


def test_a_folder_in_a_held_one_has_a_lock_of_its_own(tmp_path: Path) -> None:
    with held(tmp_path / "out"), held(tmp_path / "out" / "control"):
        assert names(tmp_path) == {
            "out",
            f"out/{LOCK}",
            "out/control",
            f"out/control/{LOCK}",
        }


def test_the_lock_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder("held", out) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert names(out) == {LOCK}
        with held(out):
            assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
    assert not (out / LOCK).exists()


def test_a_process_that_its_holder_started_does_not_hold_it(tmp_path: Path) -> None:
    with held(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with held(tmp_path):
        pass
    child.communicate(b"\n")


def test_what_is_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert not names(tmp_path)
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert names(tmp_path) == {"mine"}


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_is_no_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="is no folder: choose another --output"),
        held(tmp_path / path),
    ):
        pass


@pytest.mark.parametrize("left", ["", "{", "[]", '{"host": "other"}'])
def test_a_lock_that_nobody_signed_is_free(left: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(left)
    with held(tmp_path):
        pass
    assert not names(tmp_path)


# --- other hosts, other file systems


def left_by_another_host(folder: Path) -> Path:
    there = {"host": f"not-{socket.gethostname()}", "pid": 7, "since": "2026-01-02 03:04:05"}
    (folder / LOCK).write_text(json.dumps(there))
    return folder / LOCK


def test_a_dead_holder_on_another_host_keeps_nobody_out(tmp_path: Path) -> None:
    left_by_another_host(tmp_path)
    with held(tmp_path, beat=0.01):
        pass
    assert not names(tmp_path)


def test_a_holder_on_another_host_that_gives_signs_of_life_does(tmp_path: Path) -> None:
    """Where the file system shows its lock to its own host alone."""
    lock, over = left_by_another_host(tmp_path), threading.Event()

    def touch() -> None:
        while not over.wait(0.02):
            os.utime(lock)

    there = threading.Thread(target=touch)
    there.start()
    try:
        with (
            pytest.raises(ValueError, match=f"process 7 on not-{socket.gethostname()}, since 2026"),
            held(tmp_path, beat=1),
        ):
            pass
    finally:
        over.set()
        there.join()
    assert lock.exists()


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with held(tmp_path, beat=0.01):
        seen = {(tmp_path / LOCK).stat().st_mtime_ns}
        while len(seen) < 3:
            seen.add((tmp_path / LOCK).stat().st_mtime_ns)


def test_without_locks_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), held(tmp_path / "out"):
        (tmp_path / "out" / "mine").touch()
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'out'} is on a file system without locks")
    assert names(tmp_path) == {"out", "out/mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_where_nobody_can_write_nobody_is_kept_out(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with held(tmp_path), held(tmp_path):
        assert not names(tmp_path)


# --- a new folder, a new file


@pytest.mark.parametrize("what", [new_folder, new_file])
def test_two_savers_of_one_target_do_not_mix(what: object, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert what in (new_folder, new_file)
    save = new_folder if what is new_folder else new_file
    with holder(save.__name__, target):
        with pytest.raises(ValueError, match="is being written by"), save(target):
            pass
        assert partial_of(target).exists()
    assert target.exists() and not partial_of(target).exists()


def test_what_somebody_put_there_meanwhile_stays(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="exists and is not empty: choose another folder")
    with refused, new_folder(tmp_path / "out") as partial:
        (partial / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path) == {"out", "out/theirs"}


def test_a_killed_saver_keeps_nobody_out(tmp_path: Path) -> None:
    with holder("new_folder", tmp_path / "out") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with new_folder(tmp_path / "out") as partial:
            (partial / "file").touch()
    assert names(tmp_path) == {"out", "out/file"}


def test_a_file_that_was_moved_is_another_one(tmp_path: Path) -> None:
    """Who waits at the door of a file that is removed meanwhile gets a lock of the new one."""
    file = tmp_path / "file"
    with locked(file):
        file.rename(tmp_path / "moved")
        with locked(file) as descriptor:
            assert os.fstat(descriptor).st_ino == file.stat().st_ino
