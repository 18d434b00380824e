"""What llama.cpp makes of a file, in a process of its own: it aborts where it cannot go on.

python -m tests.export.llama_cpp FILE BLOCKS.json     perplexity of the second half of every block

All is computed in fp32. The wheel gives no logits; so a token is forced by a bias that comes after
the softmax, and what the server says is its log probability.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORCED = 1000.0
"""Added to the logit of the token that is to be drawn."""


def greedy(file: Path, ids: list[int], count: int) -> tuple[list[int], float]:
    """The ids that follow, and the log probability of the first."""
    found, logprob = _asked({"file": str(file), "prompt": ids, "count": count})
    return found, logprob


def perplexity(file: Path, blocks: list[list[int]]) -> float:
    """Of the second half of every block, after what stands before each token."""
    return float(_asked({"file": str(file), "blocks": blocks}))


def _asked(question: dict[str, Any]) -> Any:
    words = [sys.executable, "-m", "tests.export.llama_cpp", "-"]
    done = subprocess.run(
        words, input=json.dumps(question), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _server(file: str) -> Any:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel = 512, 1
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    kinds = xllamacpp.llama_flash_attn_type
    settings.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(settings)


def _said(server: Any, ids: list[int], count: int, **more: Any) -> list[Any]:
    """What follows, token by token."""
    asked = {"prompt": ids, "max_tokens": count, "temperature": 0, "logprobs": 1, **more}
    content: list[Any] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return content


def _nats(server: Any, blocks: list[list[int]]) -> Iterator[float]:
    for ids in blocks:
        for place in range(len(ids) // 2, len(ids)):
            wanted = ids[place]
            (one,) = _said(server, ids[:place], 1, logit_bias={str(wanted): FORCED})
            assert one["id"] == wanted
            yield -one["logprob"]


def main() -> None:
    """Prints one line of JSON."""
    if sys.argv[1] == "-":
        question = json.loads(sys.stdin.read())
    else:
        question = {"file": sys.argv[1], "blocks": json.loads(Path(sys.argv[2]).read_text())}
    server = _server(question["file"])
    if "blocks" in question:
        nats = list(_nats(server, question["blocks"]))
        print(json.dumps(math.exp(sum(nats) / len(nats))))
        return
    tokens = _said(server, question["prompt"], question["count"], ignore_eos=True)
    print(json.dumps([[one["id"] for one in tokens], tokens[0]["logprob"]]))


if __name__ == "__main__":
    main()
