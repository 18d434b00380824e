"""What the processes of a run do when one of them is slow, silent or gone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch

from moe_tools import processes

SILENCE, PATIENCE = timedelta(seconds=3), timedelta(seconds=60)
LONG = 2 * SILENCE.total_seconds()
NOTICED = 25
"""Seconds in which one process has to stop for another; it starts to count once both are there."""


def slow_first() -> str:
    """The first works alone for longer than a process may be silent in training."""

    def work() -> str:
        time.sleep(LONG)
        return "done"

    return processes.on_first(work)


def hangs_in_training() -> str:
    """One never comes to what the other sums up."""
    if processes.rank() == 1:
        time.sleep(PATIENCE.total_seconds())
    return str(processes.gather_rows(torch.ones(1)).sum())


def hangs_before_a_checkpoint() -> str:
    """One never comes to the point at which a checkpoint is complete."""
    if processes.rank() == 1:
        time.sleep(PATIENCE.total_seconds())
    processes.barrier()
    return "passed"


def first_hangs_before_it_works() -> str:
    """What the first does alone may take long; that it does not even begin may not."""
    if processes.rank() == 0:
        time.sleep(PATIENCE.total_seconds())
    return processes.on_first(lambda: "done")


def first_dies_at_work() -> str:
    """It is gone while the other waits for it."""
    return processes.on_first(lambda: os._exit(1))


def first_fails_at_work() -> str:
    """It raises what is no user's mistake, and nobody waits for what it was to say."""

    def work() -> str:
        raise OSError("the disk is gone")

    try:
        return processes.on_first(work)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def other_dies() -> str:
    """It is gone while the first works."""
    if processes.rank() == 1:
        processes.all_agree(True)
        os._exit(1)
    processes.all_agree(True)
    return str(processes.all_agree(True))


def process(rank: int, port: int, task: Callable[[], str], says: Connection) -> None:
    """One of two: says that it is here, then what came of its task."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", **place}
    with processes.process_group("cpu", silence=SILENCE, patience=PATIENCE):
        says.send("here")
        try:
            says.send(task())
        except RuntimeError as error:
            says.send(f"{type(error).__name__}: {error}")
        os._exit(0)  # to take leave of one that hangs takes as long


def outcome(task: Callable[[], str], waits: int) -> str:
    """What the process `waits` says of a task of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ears, mouths = zip(*(context.Pipe(duplex=False) for _ in range(2)), strict=True)
    both = [
        context.Process(target=process, args=(rank, port, task, mouth))
        for rank, mouth in enumerate(mouths)
    ]
    for one in both:
        one.start()
    try:
        for ear in ears:
            assert ear.poll(120) and ear.recv() == "here"
        assert ears[waits].poll(NOTICED), f"nothing was said in {NOTICED} seconds"
        return str(ears[waits].recv())
    finally:
        for one in both:
            one.kill()
            one.join()


@pytest.mark.slow
def test_the_first_process_may_work_for_long() -> None:
    assert outcome(slow_first, waits=1) == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "waits"),
    [
        (hangs_in_training, 0),
        (hangs_before_a_checkpoint, 0),
        (first_hangs_before_it_works, 1),
        (first_dies_at_work, 1),
        (other_dies, 0),
    ],
)
def test_a_process_that_hangs_or_dies_is_noticed(task: Callable[[], str], waits: int) -> None:
    assert "Error: " in outcome(task, waits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "said"),
    [
        (0, "OSError: the disk is gone"),
        (1, "ValueError: the first process failed: the disk is gone"),
    ],
)
def test_what_the_first_process_fails_at_is_known_to_all(process: int, said: str) -> None:
    assert outcome(first_fails_at_work, waits=process) == said


def test_training_waits_for_minutes_and_one_process_for_hours() -> None:
    assert timedelta(minutes=5) <= processes.SILENCE <= timedelta(minutes=30)
    assert timedelta(hours=12) <= processes.PATIENCE
