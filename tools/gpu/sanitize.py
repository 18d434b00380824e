"""Stage f: a small case of each kernel under compute-sanitizer: races, reads out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.gpu.cases import FEW_BITS, HOST_ODD, HOST_TINY, ODD, TINY, Case
from tools.gpu.check import Call
from tools.gpu.context import Context, Row, Skip

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
"""Where it is where PATH does not say so."""
FOUND = 9
"""What the sanitizer exits with where it finds something."""


def run(context: Context) -> Iterator[Row]:
    """Yields a row for each tool; both run at once. A dry run makes the calls without a tool."""
    if context.dry:
        tools: dict[str, list[str]] = {"no tool": []}
    else:
        program = find()
        tools = {
            tool: [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
            for tool in TOOLS
        }
    running = [(tool, *_start(prefix, context)) for tool, prefix in tools.items()]
    for tool, process, path in context.within(running):
        try:
            code = process.wait(timeout=max(1.0, context.left))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            yield {"tool": tool, "skipped": "not done at the limit"}
            continue
        yield {"tool": tool} | _verdict(code, path.read_text())
        path.unlink()


def find() -> str:
    """Returns the path of compute-sanitizer.

    Raises:
        Skip: there is none.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    found = shutil.which("compute-sanitizer", path=places)
    if found is None:
        raise Skip("compute-sanitizer is not here: it comes with the CUDA toolkit")
    return found


def _start(prefix: list[str], context: Context) -> tuple[subprocess.Popen[bytes], Path]:
    handle, path = tempfile.mkstemp()
    command = [*prefix, sys.executable, "-m", "tools.gpu", "--sanitized"]
    command += ["--dry-run"] if context.dry else []
    # Without the cache of torch each tensor is memory of its own, whose end the tool sees.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, stdout=handle, stderr=handle, env=environment)
    os.close(handle)
    return process, Path(path)


def _verdict(code: int, text: str) -> Row:
    """What a tool found, of what it wrote."""
    lines = [line.removeprefix("=========").strip() for line in text.strip().splitlines()]
    summary = [line for line in lines if "SUMMARY" in line] or lines[-1:]
    row: Row = {"summary": summary[0] if summary else ""}
    if code == FOUND:
        return row | {"wrong": row["summary"], "output": "\n".join(lines[:60])}
    if code:
        return row | {"wrong": f"it ended with {code}", "output": "\n".join(lines[-20:])}
    return row


def calls(dry: bool) -> None:
    """Makes the calls: every kernel of both passes, for one token and several, and of groups."""
    device, dtype = ("cpu", "fp32") if dry else ("cuda", "bf16")
    odd, host = (TINY, HOST_TINY) if dry else (ODD, HOST_ODD)
    for tokens in (1, 3):
        for route in ("experts", "exact gate, relu", "routed", "proposed"):
            Call(Case(route, True, dtype, tokens, odd), device).ours()
    for stored in FEW_BITS:
        Call(Case("experts", True, stored, 3, odd), device).ours()
    Call(Case("experts", True, dtype, 71, host, host=True), device).ours()
    print("all calls were made")
