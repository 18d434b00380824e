"""One writer for a file or a folder: a lock that ends with its process, however that ends.

The lock is the kernel's (`flock`): where a process is gone, so is its lock, and the file that was
locked keeps nobody out. NFS takes it to the server, so that it holds between hosts, and so do
CephFS, GPFS and Lustre, unless they are mounted for locks of one host. For those, the holder of a
folder also gives signs of life: it touches the file of its lock every few seconds.

What cannot be known, and only where locks are those of one host: whether a holder on another one
that gives no sign is dead, or stopped, or cut off. It counts as dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""The file in a folder that is being written."""
BEAT = 5.0
"""Seconds from one sign of life to the next."""
MISSED = 6
"""Signs that have to be missing before a holder on another host counts as dead."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks says."""


class Held(ValueError):
    """Another process is writing it."""


class Holder(TypedDict):
    """Who holds a folder."""

    host: str
    pid: int
    since: str


@contextmanager
def locked(file: Path, what: Path | None = None) -> Iterator[int]:
    """Opens a file, which is made if need be, and locks it; it stays where it is.

    Args:
        file: the one.
        what: is called by its name where it is refused; default: the file.

    Yields:
        Its descriptor.

    Raises:
        Held: another process has it, or an earlier call in this one.
        OSError: it cannot be opened.
    """
    ours = False
    while not ours:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, what or file)
            ours = _is_at(file, descriptor)  # else its holder moved or removed it just now
            if ours:
                yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def held(folder: Path, *, file: Path | None = None, beat: float = BEAT) -> Iterator[None]:
    """Keeps every other writer out of a folder.

    At the end the file of the lock goes, and so does a folder that was made for it and is empty.
    Where this user cannot write, there is no lock, and no need of one.

    Args:
        folder: made if need be, unless there is a file.
        file: of the lock; default: one in the folder.
        beat: see `BEAT`.

    Raises:
        Held: another process has it: who, where, and since when.
        ValueError: it is no folder.
    """
    lock = file or folder / LOCK
    made = [path for path in lock.parents if not path.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{lock.parent} is no folder: choose another --output") from error
    if not os.access(lock.parent, os.W_OK):
        yield
        return
    try:
        with locked(lock, folder) as descriptor:
            _sign(lock, folder, descriptor, beat)
            try:
                with _signs_of_life(descriptor, beat):
                    yield
            finally:
                if _is_at(lock, descriptor):
                    lock.unlink()
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()


def _lock(descriptor: int, what: Path) -> None:
    """Takes the kernel's lock; where there is none, says so and goes on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Held(_refusal(what, _holder(descriptor))) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "%s is on a file system without locks: see to it that no second command writes there",
            what,
        )


def _sign(file: Path, folder: Path, descriptor: int, beat: float) -> None:
    """Signs the file of a lock, unless one who signed it on another host still lives."""
    before = _holder(descriptor)
    if before is not None and before["host"] != socket.gethostname():
        logger.info(
            "%s was left by process %s on %s: looking %.0f s for a sign of life",
            folder,
            before["pid"],
            before["host"],
            MISSED * beat,
        )
        if _lives(file, MISSED * beat):
            raise Held(_refusal(folder, before))
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = Holder(host=socket.gethostname(), pid=os.getpid(), since=now)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def _refusal(what: Path, holder: Holder | None) -> str:
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    return f"{what} is being written by {who}: wait for its end, or choose another --output"


def _holder(descriptor: int) -> Holder | None:
    """Who signed the file of a lock; None: nobody has yet, or it is another kind of file."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(host=found["host"], pid=found["pid"], since=found["since"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether what is open still has its name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lives(file: Path, seconds: float) -> bool:
    """Whether somebody touches a file."""
    before, end = _touched(file), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(seconds / MISSED / 2)
        if _touched(file) != before:
            return True
    return False


def _touched(file: Path) -> int:
    with file.open("rb") as opened:  # NFS asks the server at every opening, and seldom in between
        return os.fstat(opened.fileno()).st_mtime_ns


@contextmanager
def _signs_of_life(descriptor: int, beat: float) -> Iterator[None]:
    over = threading.Event()

    def touch() -> None:
        while not over.wait(beat):
            with suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
