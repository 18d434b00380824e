"""What llama.cpp says to some tokens, in a process of its own: it aborts where it cannot go on.

python -m tests.export.llama_cpp FILE COUNT ID ...    greedy ids, and the first log probability
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def greedy(file: Path, ids: list[int], count: int) -> tuple[list[int], float]:
    """The ids that follow, and the log probability of the first; all in fp32."""
    words = [sys.executable, "-m", "tests.export.llama_cpp", str(file), str(count), *map(str, ids)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, logprob = json.loads(done.stdout.splitlines()[-1])
    return found, logprob


def main(file: str, count: int, ids: list[int]) -> None:
    """Prints them as one line of JSON."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel = 256, 1
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    kinds = xllamacpp.llama_flash_attn_type
    settings.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    said: Any = server.handle_completions(
        {"prompt": ids, "max_tokens": count, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    )
    tokens = said["choices"][0]["logprobs"]["content"]
    print(json.dumps([[one["id"] for one in tokens], tokens[0]["logprob"]]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(word) for word in sys.argv[3:]])
