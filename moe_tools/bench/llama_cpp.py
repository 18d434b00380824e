"""The dense model in llama.cpp, as rows of `bench generate`: written as GGUF, then run in turn.

llama.cpp is its program `llama-bench`, a process for each phase of a round, or the Python package
`llama_cpp`, in this process. The program draws its prompt itself, and decodes random tokens; where
it is too old to decode behind a prompt (`-d`), it decodes from an empty context, which is faster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.bench.generate import Rival, Seconds
from moe_tools.export.gguf import EMBEDDING, HEAD, plan
from moe_tools.export.gguf_file import write_gguf
from moe_tools.export.plan import Kind
from moe_tools.extras import needed

PROGRAM, PACKAGE = "llama-bench", "llama_cpp"
KINDS: tuple[Kind, ...] = ("f16", "q8_0", "q4_0")
LAST = 3
"""Lines of what a program said that an error repeats."""

Timer = Callable[[Tensor, int], Seconds]
"""Times a prompt and its tokens, as `Rival.seconds` says."""
Engine = Callable[[Path, int, int], AbstractContextManager[Timer]]
"""Takes a GGUF file, tokens of context and threads; gives what times the file while it lasts."""


def find_llama_cpp(program: str | None = None) -> Engine:
    """Finds llama.cpp: the program at a path, one on PATH, or the Python package.

    Args:
        program: a path to `llama-bench`; None: look for it.

    Raises:
        ValueError: there is none.
    """
    if program is not None and shutil.which(program) is None:
        raise ValueError(f"{program} is no program that can be run: give a path to {PROGRAM}")
    found = shutil.which(program or PROGRAM)
    if found is not None:
        return _Program(found)
    if find_spec(PACKAGE) is not None:
        return _in_process
    raise ValueError(
        f"llama.cpp is not here: give a path to its {PROGRAM} by --{PROGRAM}, put it on PATH, or "
        "pip install llama-cpp-python"
    )


@contextmanager
def llama_cpp_rivals(
    model: PreTrainedModel,
    engine: Engine,
    *,
    context: int,
    threads: int,
    kinds: Sequence[Kind] = KINDS,
) -> Iterator[list[Rival]]:
    """Writes a dense model to a temporary folder for a while, and has llama.cpp run it.

    Args:
        model: dense.
        engine: what `find_llama_cpp` gave.
        context: tokens of a prompt with all that follow.
        threads: that llama.cpp uses.
        kinds: of weights, a row each.

    Raises:
        ValueError: a model that `plan` or `write_gguf` refuses, or that llama.cpp does.
    """
    planned, tensors = plan(model.config), model.state_dict()
    with TemporaryDirectory(prefix="moe-tools-") as folder, ExitStack() as loaded:
        rivals = []
        for kind in kinds:
            file = Path(folder) / f"dense-{kind}.gguf"
            write_gguf(planned, tensors, file, kind)
            seconds = loaded.enter_context(engine(file, context, threads))
            rivals.append(Rival(f"llama.cpp {kind}", file_token_bytes(file), seconds))
        yield rivals


def file_token_bytes(file: Path) -> int:
    """Bytes of the matrices of a GGUF file that a decoded token reads.

    All but the embedding, of which it reads a row, unless that is the head as well.
    """
    gguf = needed("gguf", "gguf", str(file))
    sizes = {
        tensor.name: int(tensor.n_bytes)
        for tensor in gguf.GGUFReader(file).tensors
        if len(tensor.shape) > 1
    }
    return sum(sizes.values()) - (sizes[EMBEDDING] if HEAD in sizes else 0)


@dataclass(frozen=True)
class _Program:
    """`llama-bench` at a path."""

    path: str

    @contextmanager
    def __call__(self, file: Path, context: int, threads: int) -> Iterator[Timer]:
        """Makes what times a file; the program sets its context itself."""
        knows_depth = "--n-depth" in self._said(["--help"])
        common = ["-m", str(file), "-r", "1", "-t", str(threads), "-ngl", "0", "-o", "json"]

        def seconds(ids_BT: Tensor, tokens: int) -> Seconds:
            prompt = str(ids_BT.shape[1])
            depth = ["-d", prompt] if knows_depth else []
            prefill = self._seconds([*common, "-p", prompt, "-n", "0"])
            return prefill, self._seconds([*common, "-p", "0", "-n", str(tokens), *depth])

        yield seconds

    def _seconds(self, options: list[str]) -> float:
        said = self._said(options)
        try:
            (test,) = json.loads(said)
            return float(test["avg_ns"]) / 1e9
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} did not print one test as JSON, but: {_last(said)}"
            ) from error

    def _said(self, options: list[str]) -> str:
        """What the program prints; that it fails is an error of one line.

        Raises:
            ValueError: it cannot be started, or ends with another code than 0.
        """
        try:
            done = subprocess.run([self.path, *options], capture_output=True, errors="replace")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be run: {error.strerror}") from error
        if done.returncode:
            raise ValueError(
                f"{self.path} ended with code {done.returncode}: {_last(done.stderr + done.stdout)}"
            )
        return done.stdout


def _last(text: str) -> str:
    """The last lines of a text, in one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-LAST:]) or "nothing"


@contextmanager
def _in_process(file: Path, context: int, threads: int) -> Iterator[Timer]:
    """Loads a file by the Python package; the tokens that it decodes are its own, greedy ones."""
    with closing(GreedyLlama(file, context, threads)) as greedy:

        def seconds(ids_BT: Tensor, tokens: int) -> Seconds:
            began = time.perf_counter()
            token = greedy.prefill(ids_BT[0].tolist())
            middle = time.perf_counter()
            for _ in range(tokens):
                token = greedy.decode(token)
            return middle - began, time.perf_counter() - middle

        yield seconds


class GreedyLlama:
    """A GGUF file in the Python package `llama_cpp`, decoded greedily.

    Args:
        file: where it is.
        context: tokens that it has room for.
        threads: that it uses.

    Raises:
        ValueError: no such package, or one that cannot load the file.
    """

    def __init__(self, file: Path, context: int, threads: int) -> None:
        try:
            self._package: Any = import_module(PACKAGE)
            self._llama = self._package.Llama(
                str(file),
                n_ctx=context,
                n_batch=context,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=False,
                verbose=False,
            )
        except Exception as error:  # whatever its build lacks
            raise ValueError(f"{PACKAGE} cannot load {file.name}: {_last(str(error))}") from error

    def close(self) -> None:
        """Frees it: at the end of Python, the package would fail to."""
        self._llama.close()

    def prefill(self, ids: Sequence[int]) -> int:
        """Begins anew with a prompt, and returns the token that follows.

        Raises:
            ValueError: llama.cpp fails.
        """
        self._llama.reset()
        return self._eval(ids)

    def decode(self, token: int) -> int:
        """Takes one token more, and returns the one that follows.

        Raises:
            ValueError: llama.cpp fails.
        """
        return self._eval([token])

    def logits_V(self) -> Any:
        """Returns the logits of the last token: a view, which the next call writes over."""
        import numpy

        pointer = self._package.llama_get_logits_ith(self._llama.ctx, -1)
        return numpy.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))

    def _eval(self, ids: Sequence[int]) -> int:
        try:
            self._llama.eval(ids)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp failed: {_last(str(error))}") from error
        return int(self.logits_V().argmax())
