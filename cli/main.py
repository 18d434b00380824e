"""`moe-tools VERB`: finds the verb, imports it and nothing else, and turns errors into one line."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from moe_tools import processes
from moe_tools.checkpoint.remote_code import trusted
from moe_tools.disk import cannot_write
from moe_tools.registry import unknown
from moe_tools.steps.time_limit import TimeIsUp
from moe_tools.waiting import passive_waiting

VERBS = (
    "convert",
    "train",
    "evaluate",
    "recommend",
    "inspect",
    "compare",
    "grid",
    "generate",
    "serve",
    "recipes",
    "upcycle",
    "export",
    "doctor",
    "bench",
    "demo",
)
"""Each is a module of `moe_tools.cli` with SUMMARY, add_arguments(parser) and run(args); it
imports torch only in run."""
RESUMING = ("convert", "train", "compare", "grid", "demo")
"""Verbs that go on where they were interrupted."""
MODELLESS = ("recipes", "bench", "demo")
"""Verbs that load no model of the user's choice."""
HANDING_ON = ("serve",)
"""Verbs that hand what stands behind `--` to another program, as `args.behind`."""
DEBUG = "MOE_TOOLS_DEBUG"
GRACE = 20
"""Seconds that other processes wait before they fail: the launcher usually ends them first."""

OK, FAILURE, USAGE, TIME_IS_UP, INTERRUPTED = 0, 1, 2, 75, 130
"""The exit codes; 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, come again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 2 is a user's mistake, 130 an interruption.

    75 says that the time of `--max-hours` is up, and that the same command goes on.

    A loss that is not finite is a mistake, too: a learning rate's. So is a disk without room.

    With MOE_TOOLS_DEBUG=1 an error keeps its traceback, and no warning is hidden.
    """
    passive_waiting()
    _print_anything()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):  # deepspeed says it here and in LOCAL_RANK
        words = words[1:]
    try:
        with _quiet():
            return _run(words)
    except KeyboardInterrupt:
        resumes = bool(words) and words[0] in RESUMING
        return _fail("interrupted" + ("; the same command resumes" if resumes else ""), INTERRUPTED)
    except TimeIsUp as stopped:
        if processes.rank():
            time.sleep(GRACE)
            return TIME_IS_UP
        return _fail(str(stopped), TIME_IS_UP)
    except Exception as error:
        said = cannot_write(error) or error
        if _debugging() or not isinstance(said, ValueError | FloatingPointError | OSError):
            raise
        code = FAILURE if isinstance(said, OSError) else USAGE
        if processes.rank() and code == USAGE:
            time.sleep(GRACE)  # the first process says the same, unless the launcher ends it before
            return code
        return _fail(str(said) or repr(said), code)


def _print_anything() -> None:
    """Lets text through that the encoding of a pipe or terminal lacks, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return OK if words else USAGE
    if words[0] == "--version":
        from moe_tools import __version__

        print(f"moe-tools {__version__}")
        return OK
    if words[0] not in VERBS:
        raise unknown("verb", words[0], VERBS)
    if processes.count() > 1 and words[0] != "train":
        raise ValueError(f"{words[0]} runs in one process: start it without torchrun or deepspeed")
    verb = import_module(f"moe_tools.cli.{words[0]}")
    parser = _Parser(prog=f"moe-tools {words[0]}", description=_sentence(verb.SUMMARY))
    verb.add_arguments(parser)
    if words[0] not in MODELLESS:
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let Python code that comes with a model run; never asked for otherwise",
        )
    own, behind = words[1:], []
    if words[0] in HANDING_ON and "--" in own:
        own, behind = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if words[0] in HANDING_ON:
        args.behind = behind
    with trusted(vars(args).pop("trust_remote_code", False)):
        return int(verb.run(args))


class _Parser(argparse.ArgumentParser):
    """Raises a mistake on the command line as a ValueError, which becomes one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _help() -> str:
    summaries = {verb: import_module(f"moe_tools.cli.{verb}").SUMMARY for verb in VERBS}
    lines = "\n".join(f"  {verb:<10} {summary}" for verb, summary in summaries.items())
    return (
        "usage: moe-tools VERB ...\n\n"
        "Turn a dense language model into one that computes only what a token needs.\n\n"
        f"verbs:\n{lines}\n\n"
        "`moe-tools VERB --help` lists a verb's options; `moe-tools --version` says the version."
    )


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _fail(message: str, code: int) -> int:
    print(f"moe-tools: {' '.join(message.split())}", file=sys.stderr)
    return code


TALKATIVE = ("DeepSpeed", "torchao", "torch.utils._pytree")
"""Loggers that speak at import: the first on standard output, which is for results, the others of
what an install without a GPU lacks."""


def _debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


@contextmanager
def _quiet() -> Iterator[None]:
    """Sends our log to standard error, and hides warnings of other packages unless debugging."""
    ours, handler = logging.getLogger("moe_tools"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("moe-tools: %(message)s"))
    level, handlers, propagate = ours.level, ours.handlers, ours.propagate
    ours.handlers, ours.propagate = [handler], False
    others, silent = [logging.getLogger(name) for name in TALKATIVE], logging.Filter("none of them")
    ours.setLevel(logging.ERROR if processes.rank() else logging.INFO)  # the first one speaks
    try:
        with warnings.catch_warnings():
            if not _debugging():
                for logger in others:
                    logger.addFilter(silent)
                warnings.filterwarnings("ignore", module=r"(?!moe_tools)")
            yield
    finally:
        for logger in others:
            logger.removeFilter(silent)
        ours.handlers, ours.propagate = handlers, propagate
        ours.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
