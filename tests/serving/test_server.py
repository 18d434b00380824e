"""The whole program: its start, its mistakes and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from moe_tools.cli.main import main
from moe_tools.serving.server import bind

ROOT = Path(__file__).parents[2]


@contextmanager
def started(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`moe-tools serve` as a process of its own, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moe_tools.cli.main", "serve", str(folder)]
    command += ["--port", str(port), "--dtype", "fp32", *words]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if f"http://127.0.0.1:{port}/v1" in line:
                break
        yield process, port
    finally:
        process.kill()
        process.wait()


def ask(port: int, new: int) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "w1 w2", "max_tokens": new, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


@pytest.mark.parametrize(
    ("number", "batching"),
    [(signal.SIGTERM, "auto"), pytest.param(signal.SIGINT, "off", marks=pytest.mark.slow)],
)
def test_a_signal_lets_what_runs_finish_and_ends_with_0(
    folders: Path, number: int, batching: str
) -> None:
    with started(folders / "routed", "--batching", batching) as (process, port):
        connection = ask(port, 100)
        answer = connection.getresponse()
        process.send_signal(number)
        text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        assert process.wait(30) == 0


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_ended(folders: Path) -> None:
    with started(folders / "routed", "--grace", "1", "--max-body", "2000") as (process, port):
        idle = socket.create_connection(("127.0.0.1", port))  # sends half of a request
        idle.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 20
        idle.close()


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a mistake."""
    assert main(["serve", *words]) == 2
    out, error = capsys.readouterr()
    assert not out
    (line,) = error.strip().splitlines()
    return line


def test_a_port_that_is_taken(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as held:
        held.listen()
        port = str(held.getsockname()[1])
        line = mistake(capsys, str(folders / "dense"), "--port", port)
    assert f"127.0.0.1:{port} cannot be taken (Address already in use)" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{work}/nothing"], "no such folder"),
        (["{work}"], "the folder is incomplete"),
        (["{work}/dense", "--port", "99999"], "--port 99999 is no port"),
        (["{work}/dense", "--host", "no.such.host.invalid"], "is no address of this machine"),
        (["{work}/dense", "--host", "192.0.2.1", "--port", "0"], "cannot be taken"),
        (["{work}/dense", "--api-key", " "], "the API key is empty"),
        (["{work}/dense", "--packed-dtype", "int8"], "--packed-dtype is of the sparse kernels"),
        (["{work}/dense", "--optimize", "--port", "0", "--screen", "4"], "no FFN to optimise"),
        (["{work}/dense", "--", "--max-model-len", "64"], "stands behind --"),
        (["{work}/dense", "--engine", "vllm", "--optimize"], "--optimize is of the engine trans"),
        (["{work}/dense", "--engine", "vllm", "--device", "cpu"], "--device is of the engine"),
    ],
)
def test_a_mistake_is_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in mistake(capsys, *(word.format(work=folders) for word in words))


def test_a_model_that_continues_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_tools.checkpoint.saving import save
    from tests.families import build
    from tests.tiny import build_tokenizer

    save(build("bert"), tmp_path / "bert", build_tokenizer())
    line = mistake(capsys, str(tmp_path / "bert"), "--port", "0", "--dtype", "fp32")
    assert "continues no text" in line
