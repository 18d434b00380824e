"""Memory that was freed is used again while it is kept, and goes back afterwards."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from moe_tools.data.generate import evaluating
from moe_tools.freed_memory import CHOICES, keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone")

PAGES = """
import json, resource, threading, torch
from moe_tools.freed_memory import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        del_me = torch.ones(2**24)  # 64 MiB
        del del_me
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

faults()
seen = {"before": faults(), "start": resident()}
"""


def run(code: str, **environment: str) -> dict[str, int]:
    """What a process prints; no allocator is chosen but by `environment`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(CHOICES)}
    done = subprocess.run(
        [sys.executable, "-c", PAGES + textwrap.dedent(code) + "\nprint(json.dumps(seen))"],
        env=own | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


@glibc
def test_it_is_used_again_and_goes_back() -> None:
    seen = run(
        """
        with keep_freed_memory("cpu"):
            faults()
            seen["kept"] = faults()
            with keep_freed_memory("cpu"):  # as evaluating while training
                pass
            seen["still"] = faults()
            seen["resident"] = resident()
        seen["end"] = resident()
        """
    )
    assert seen["kept"] < seen["before"] / 20 and seen["still"] < seen["before"] / 20
    assert seen["resident"] > seen["start"] + 2**25
    assert seen["end"] < seen["start"] + 2**24


@glibc
def test_evaluating_keeps_it() -> None:
    seen = run(
        """
        from moe_tools.data.generate import evaluating
        with evaluating(torch.nn.Linear(1, 1)):
            faults()
            seen["kept"] = faults()
        """
    )
    assert seen["kept"] < seen["before"] / 20


@glibc
@pytest.mark.parametrize(
    ("device", "environment"),
    [("cuda", {}), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "1000000"}), ("cpu", {"GLIBC_TUNABLES": ""})],
)
def test_nothing_changes_elsewhere_or_where_the_user_has_chosen(
    device: str, environment: dict[str, str]
) -> None:
    seen = run(
        f"""
        with keep_freed_memory({device!r}):
            seen["kept"] = faults()
        """,
        **environment,
    )
    assert seen["kept"] > seen["before"] / 2


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), keep_freed_memory("cpu"):
        raise ZeroDivisionError
    with keep_freed_memory("cpu"):
        assert torch.ones(4).sum() == 4


def test_a_module_without_parameters() -> None:
    with evaluating(nn.ReLU()) as nothing:
        assert nothing is None
